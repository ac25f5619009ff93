"""Everything that can go wrong, and what HTTP says of it.

    ErnieServeError
    ├── StartupError                 the server cannot start: said on the command line, exit code 1
    │   ├── SettingsError            a flag, environment name or preset line is wrong
    │   ├── CheckpointError          the model folder, its config or its tensors are wrong
    │   └── NotEnoughMemory          what is needed, what is free, and the flag to change
    └── RequestError                 a request cannot be answered: OpenAI's error body
        ├── InvalidRequest      400  the request is wrong; `param` names the field
        │   └── ContextLengthExceeded
        ├── Unauthorized        401
        ├── ModelNotFound       404
        ├── UnknownUrl          404
        ├── MethodNotAllowed    405
        ├── RequestTimeout      408
        ├── RequestTooLarge     413
        ├── UnsupportedMedia    415
        ├── EngineUnavailable   503  loading, or ended; try again later
        └── EngineFailure       500  the engine failed this request; it is not charged

Knows statuses, OpenAI's `type` and `code`, and nothing of how an answer is sent.
"""

from typing import ClassVar


class ErnieServeError(Exception):
    """Anything this project raises on purpose."""


class StartupError(ErnieServeError):
    """The server cannot start; the message says what to change."""


class SettingsError(StartupError):
    """A setting is unknown, malformed or contradicts another."""


class CheckpointError(StartupError):
    """The checkpoint cannot be served; the message names the file, key or tensor."""


class NotEnoughMemory(StartupError):
    """The model or its cache does not fit; the message has both numbers and the flag to change."""


class RequestError(ErnieServeError):
    """A request that is answered with an error. `param` names the field at fault, if one is."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_seconds: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_seconds = retry_after_seconds


class InvalidRequest(RequestError):
    """The request is malformed, out of range, or asks for what is not offered."""

    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together do not fit the model's context."""

    code = "context_length_exceeded"


class Unauthorized(RequestError):
    """No key, or none that is known."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class UnknownUrl(RequestError):
    """There is nothing at this path."""

    status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class MethodNotAllowed(RequestError):
    """The path exists, but not for this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(RequestError):
    """The client took too long to send its request."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class RequestTooLarge(RequestError):
    """The body is larger than the server reads."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMedia(RequestError):
    """The body is not JSON, or is compressed."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class EngineUnavailable(RequestError):
    """The engine is still loading, is shutting down, or has ended."""

    status = 503
    type = "server_error"
    code = "engine_unavailable"


class EngineFailure(RequestError):
    """The engine failed while it worked on this request."""

    status = 500
    type = "server_error"
    code = "engine_failure"
