"""The outermost layer: a request id, the time taken, a line of the log, and an answer even when we fail.

Plain ASGI, because wrappers that buffer or hide messages would also hide that a client left. Knows nothing
of routes.
"""

import logging
import re
import time
from collections.abc import Callable, Iterable
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ernie_serve.api.connection import ClientLeft
from ernie_serve.api.problems import error_response, unexpected

logger = logging.getLogger(__name__)


class Envelope:
    """Adds `x-request-id` and `openai-processing-ms`, drops a trailing slash, and turns any failure into a JSON 500.

    `answered` is told the path and the status of each answer; the log is told of each request at its level debug.
    """

    def __init__(self, app: ASGIApp, answered: Callable[[str, int], None]) -> None:
        self._app = app
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and see to it that it is answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        request_id = sane_request_id(scope["headers"]) or f"req_{uuid4().hex}"
        status: int | None = None
        has_left = False

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._answered(scope["path"], status)
                taken = (time.perf_counter() - start) * 1000
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", b"%d" % taken),
                ]
            await send(message)

        path = scope["path"]
        scope = {**scope, "path": path.rstrip("/") or "/"} if path.endswith("/") else scope
        try:
            await self._app(scope, receive, send_with_headers)
        except ClientLeft:
            has_left = True
        except Exception as error:
            told = unexpected(error, f"{scope['method']} {scope['path'][:200]!r} ({request_id})")
            if status is None:  # otherwise the server closes the connection, which the client sees as a cut answer
                await error_response(told)(scope, receive, send_with_headers)
        finally:
            if logger.isEnabledFor(logging.DEBUG):
                taken = (time.perf_counter() - start) * 1000
                what = f"{scope['method']} {scope['path'][:200]!r} ({request_id})"
                left = ", when its client left" if has_left else ""
                logger.debug("%s: %s after %.1f ms%s", what, status or "no answer", taken, left)


def sane_request_id(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The client's own request id, if it is short and plain."""
    for name, value in headers:
        if name == b"x-request-id" and re.fullmatch(rb"[A-Za-z0-9._:-]{1,128}", value):
            return value.decode()
    return None
