"""Everything that can go wrong, and what HTTP says of it.

    ErnieServeError
    ├── StartupError                 the server cannot start: said on the command line, exit code 1
    │   ├── SettingsError            a flag, environment name or preset line is wrong
    │   ├── CheckpointError          the model folder, its config or its tensors are wrong
    │   └── NotEnoughMemory          what is needed, what is free, and the flag to change
    ├── DeviceLost                   a GPU answers nothing any more: the engine process ends
    └── RequestError                 a request cannot be answered: OpenAI's error body
        ├── InvalidRequest      400  the request is wrong; `param` names the field
        │   ├── ContextLengthExceeded
        │   └── PreviousResponseNotFound
        ├── Unauthorized        401
        ├── PaymentRequired     402  the balance or a monthly limit is too small; both numbers are in the message
        ├── Forbidden           403  the key is known, but may not do this
        ├── HostNotServed       403  no key is asked for, and the request is to a name that a web page may have
        ├── ModelNotFound       404
        ├── ResponseNotFound    404
        ├── RecordNotFound      404  no such key, account, project or charged request
        ├── UnknownUrl          404
        ├── MethodNotAllowed    405
        ├── RequestTimeout      408
        ├── RequestConflict     409  the same idempotency key is still being answered
        ├── RequestTooLarge     413
        ├── UnsupportedMedia    415
        ├── IdempotencyMismatch 422  an idempotency key came back with another body
        ├── RateLimited         429  the caller's own limit; try again after the seconds told
        ├── HeadersTooLarge     431
        ├── Overloaded          503  no time for what comes before the engine, such as a schema; try again
        ├── EngineUnavailable   503  loading, or ended; try again later
        ├── StoreUnavailable    503  the billing store cannot be written; nothing was generated or charged
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


class DeviceLost(ErnieServeError):
    """A GPU that has failed answers nothing any more in this process; only a new one can use it."""


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


class PreviousResponseNotFound(InvalidRequest):
    """A response is to go on from one that is not kept."""

    code = "previous_response_not_found"


class Unauthorized(RequestError):
    """No key, or none that is known."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class PaymentRequired(RequestError):
    """What is left does not pay for the request."""

    status = 402
    type = "insufficient_quota"
    code = "insufficient_quota"


class Forbidden(RequestError):
    """The key is good, but its scopes do not reach this far."""

    status = 403
    type = "invalid_request_error"
    code = "insufficient_permissions"


class HostNotServed(RequestError):
    """Without keys only requests to this machine's own names are answered."""

    status = 403
    type = "invalid_request_error"
    code = "host_not_served"


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class ResponseNotFound(RequestError):
    """There is no kept response of this id for this key."""

    status = 404
    type = "invalid_request_error"


class RecordNotFound(RequestError):
    """The billing store has no such key, account, project or request that this caller may see."""

    status = 404
    type = "invalid_request_error"


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


class RequestConflict(RequestError):
    """A request with the same idempotency key is still running."""

    status = 409
    type = "invalid_request_error"
    code = "idempotency_conflict"


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


class IdempotencyMismatch(RequestError):
    """An idempotency key was used before, for another body."""

    status = 422
    type = "invalid_request_error"
    code = "idempotency_mismatch"


class RateLimited(RequestError):
    """The caller asks faster, or for more at once, than the key allows."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class HeadersTooLarge(RequestError):
    """A head with more bytes than are read."""

    status = 431
    type = "invalid_request_error"


class Overloaded(RequestError):
    """The machine has no time for what has to be done before the engine can be asked."""

    status = 503
    type = "server_error"
    code = "overloaded"


class EngineUnavailable(RequestError):
    """The engine is still loading, is shutting down, or has ended."""

    status = 503
    type = "server_error"
    code = "engine_unavailable"


class StoreUnavailable(RequestError):
    """The billing store is down, read-only or full: nothing is generated that could not be charged."""

    status = 503
    type = "server_error"
    code = "billing_unavailable"


class EngineFailure(RequestError):
    """The engine failed while it worked on this request."""

    status = 500
    type = "server_error"
    code = "engine_failure"
