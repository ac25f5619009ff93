"""One HTTP connection: uvicorn's, within bounds, and one request at a time.

Knows what a client may do to a connection. Knows no route.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ernie_serve.api.problems import error_response
from ernie_serve.errors import EngineUnavailable, HeadersTooLarge, InvalidRequest, RequestError, RequestTimeout

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 65536
HEAD_SECONDS = 30.0
"""How long the head of a request may take to arrive, from its first byte on."""

_LINGER_SECONDS = 1.0


class HttpProtocol(HttpToolsProtocol):
    """Ends a connection whose request has a head that is too large or too slow.

    What a client sends before it has its answer is read, so that its leaving is seen, and thrown away: the connection
    is closed behind that answer, and such a client asks again (RFC 9112, section 9.3.2). A wish to go on in another
    protocol is passed over (RFC 9110, section 7.8). `answered` is told the path and the status of each answer that is
    given here and not by the application; the path is empty where none was read.
    """

    def __init__(
        self, *args: Any, answered: Callable[[str, int], None] = lambda path, status: None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._answered = answered
        self._answering: Any = None
        self._is_deaf = False  # what still comes is read and thrown away
        self._in_head = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """A client has come; it has as long to say something as between two requests."""
        super().connection_made(transport)
        self._time_head(self.timeout_keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, whatever it had asked for."""
        self._time_head(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a request, taken in pieces that no head can end in that is too large."""
        while data:
            room = max(1, MAX_HEAD_BYTES - (self._head_bytes if self._in_head else 0))
            self._receive(data[:room])
            data = data[room:]

    def _receive(self, data: bytes) -> None:
        if self._is_deaf or self.transport.is_closing():
            return
        if self.cycle is not None and not (self.cycle.response_complete or self.cycle.more_body):
            self._be_last()
            return
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            told = "Invalid HTTP request received."
            self.logger.warning(told)
            self.send_400_response(told)
        if (self.pipeline or self._in_head) and not (self._answering is None or self._answering.response_complete):
            self._be_last()
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadersTooLarge(f"The headers have more than {MAX_HEAD_BYTES} bytes. Send fewer."))
        elif self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._time_head(self.timeout_keep_alive)  # an empty line between requests has ended uvicorn's own waiting

    def _parse(self, data: bytes) -> None:
        """Parse what has come; a request that asks for another protocol begins anew without that header.

        The parser ends it behind its head, as if what follows were of the other protocol. Here that is the body: taken
        for a request it would be one that no proxy before this server has seen.
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as end:
                data = self._head_without_upgrade() + data[end.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it

    def _head_without_upgrade(self) -> bytes:
        method = self.parser.get_method()
        if method == b"CONNECT":  # which asks for another protocol by itself
            raise httptools.HttpParserError("This is no proxy.")
        first = b"%b %b HTTP/%b\r\n" % (method, self.url, self.parser.get_http_version().encode())
        kept = (b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade")
        return first + b"".join(kept) + b"\r\n"

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._time_head(HEAD_SECONDS)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; what comes behind a body is dropped, however much it is."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head of a request is here, unless it asks for another protocol and begins anew."""
        if self.parser.should_upgrade():
            return
        self._in_head = False
        self._time_head(None)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request is here with its body, which one that begins anew has not had."""
        if not self._in_head:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Say that this is no HTTP, as every other error is said; behind a request that is, answer that one."""
        cycle = self._answering
        if cycle is None or cycle.response_complete or cycle.more_body:
            self._refuse(InvalidRequest(msg))
        else:
            self._be_last()

    def end(self) -> None:
        """End the connection, because the server ends: with an answer where a request has not come whole."""
        cycle = self.cycle
        if cycle is not None and cycle.more_body and not (cycle.response_started or cycle.disconnected):
            self._refuse(EngineUnavailable("The server is shutting down.", retry_after_seconds=10))
        else:
            self.transport.abort()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        knows_chunks = cycle.scope["http_version"] == "1.1"
        cycle.waiting_for_100_continue &= knows_chunks  # RFC 9110, section 10.1.1
        super()._start_asgi_task(cycle, app if knows_chunks else partial(_unframed, app, cycle))

    def _be_last(self) -> None:
        """Answer nothing on this connection after what is being answered."""
        self._is_deaf, self._in_head = True, False
        self._time_head(None)
        self.pipeline.clear()
        self.cycle = self._answering
        self.cycle.keep_alive = False
        self.flow.resume_reading()

    def _refuse(self, error: RequestError) -> None:
        """Answer with an error, unless an answer has begun, and close the connection.

        What the client still sends is read and thrown away for a second: it would not hear the answer otherwise.
        """
        self._is_deaf, self._in_head = True, False
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self._answered("" if cycle is None or cycle.response_complete else cycle.scope["path"], error.status)
            logger.debug("A connection ends with %d: %s", error.status, error.message)
            answer = error_response(error, {"connection": "close"})
            first = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n".encode()
            head = b"".join(b"%b: %b\r\n" % header for header in answer.raw_headers)
            self.transport.write(first + head + b"\r\n" + bytes(answer.body))
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.write_eof()
        self._time_head(_LINGER_SECONDS)

    def _time_head(self, seconds: float | None) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = None if seconds is None else self.loop.call_later(seconds, self._is_slow)

    def _is_slow(self) -> None:
        if self._in_head:
            self._refuse(RequestTimeout(f"The headers did not arrive within {HEAD_SECONDS:g} seconds."))
        else:
            self.transport.close()


async def _unframed(app: ASGIApp, cycle: Any, scope: Scope, receive: Receive, send: Send) -> None:
    """End an answer without a length by ending the connection: HTTP/1.0 knows no chunks (RFC 9112, section 6.1)."""
    has_length, is_whole = True, False

    async def send_bare(message: Message) -> None:
        nonlocal has_length, is_whole
        if message["type"] == "http.response.start":
            has_length = any(name == b"content-length" for name, _ in message["headers"])
            if not has_length:
                cycle.chunked_encoding = cycle.keep_alive = False
        elif not has_length:
            # by which uvicorn knows that the answer is whole
            cycle.expected_content_length = len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
        await send(message)

    try:
        await app(scope, receive, send_bare)
    finally:
        if not (has_length or is_whole):
            cycle.transport.abort()  # an end like any other would say that this was all
