"""Errors as HTTP says them: OpenAI's error body, on every route, for every status.

Knows the tree in `errors.py` and how it is sent. Knows nothing of what went wrong.
"""

import logging
import traceback

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.whole import JsonAnswer
from ernie_serve.errors import InvalidRequest, MethodNotAllowed, RequestError, UnknownUrl

logger = logging.getLogger(__name__)

DEFAULT_RETRY_SECONDS = 5


def error_body(error: RequestError) -> bytes:
    """OpenAI's error body, encoded."""
    return orjson.dumps(
        {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
    )


def error_response(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    """The error as a whole answer, with `Retry-After` where waiting helps."""
    headers = dict(headers or {})
    if error.status == 503 or error.retry_after_seconds is not None:
        headers["retry-after"] = str(error.retry_after_seconds or DEFAULT_RETRY_SECONDS)
    if error.status == 408:
        headers["connection"] = "close"  # the rest of the body would be taken for the next request
    return JsonAnswer(error_body(error), status_code=error.status, headers=headers)


def unexpected(error: BaseException, where: str) -> RequestError:
    """Log a failure that nobody foresaw, and return what its client is told.

    Exception messages and values may quote a prompt, so the log gets the types and the frames alone.
    """
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 5:
        parts.append(f"{type(cause).__qualname__}\n{''.join(traceback.format_tb(cause.__traceback__))}")
        cause = cause.__cause__ or cause.__context__
    logger.error("Unexpected failure in %s: %s", where, "caused by ".join(parts))
    return RequestError("The server failed to answer this request; its log has the details. Trying again may help.")


_FORGOTTEN = ("/chat/completions", "/completions", "/models", "/responses")
"""What is asked for by who forgot /v1."""


def unknown_url(method: str, path: str) -> UnknownUrl:
    """What is told where there is nothing; who may have forgotten /v1 is told that, everybody where the list is."""
    hint = "/openapi.json lists those that are served."
    if not path.startswith(("/v1/", "/admin")):
        here = f", and this is /v1{path}" if path in _FORGOTTEN else ""
        hint = f"The API lives under /v1{here}; /health and /metrics tell how the server is. {hint}"
    return UnknownUrl(f"Unknown request URL: {method} {path[:200]}. {hint}")


async def handle_request_error(request: Request, error: Exception) -> Response:
    """What any route raises on purpose."""
    assert isinstance(error, RequestError)
    return error_response(error)


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """What the router raises: no such path, no such method. OPTIONS asks just for the methods there are."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        return error_response(unknown_url(request.method, request.url.path))
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": f"{allowed}, OPTIONS"})
        told = f"{asked} is not allowed; this URL answers {allowed}."
        return error_response(MethodNotAllowed(told), {"allow": allowed})
    return error_response(InvalidRequest(str(error.detail)))
