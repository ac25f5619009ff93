"""An answer that is sent while it is made: server-sent events, pings in silence, an error event when it breaks.

Knows events as bytes that somebody else encoded. Knows nothing of choices or tokens.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ernie_serve.api.connection import ClientLeft, cancel_all, until_disconnect
from ernie_serve.api.problems import error_body, unexpected
from ernie_serve.api.services import Limits
from ernie_serve.errors import RequestError

DONE = b"data: [DONE]\n\n"
UNPAID = b',"credit_exhausted":true'
"""What stands behind the `finish_reason` of a choice whose next token could not be paid for."""
PING = b": ping\n\n"


def error_event(error: RequestError) -> bytes:
    """OpenAI's error body as an event, which its SDK raises."""
    return b"data: %b\n\n" % error_body(error)


class Last(bytes):
    """The chunk that ends a stream, which is sent together with the end of the response."""


class EventStream(Response):
    """Sends chunks as they come, each of whole events; the one that ends the stream is a `Last`.

    The status line waits for the first chunk or the first ping, so that what fails before still has its own
    status. Nothing is buffered here: a chunk is asked for when the one before has been taken, and a client that
    takes nothing for `stall_seconds` is left. Whatever ends the stream closes the generator of chunks. `failure` tells
    what broke it; `client_left` is told when the client does not want the rest.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        limits: Limits,
        failure: Callable[[RequestError], bytes] = error_event,
        client_left: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._limits = limits
        self._failure = failure
        self._client_left = client_left
        self._started = False
        self._turn = asyncio.Lock()  # so that a ping never falls between a status line and its first chunk
        self._last_seconds = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the chunks end or the client leaves. Raises `ClientLeft`, and what fails before the start."""
        self._last_seconds = asyncio.get_running_loop().time()
        writing = asyncio.ensure_future(self._write(send))
        others = asyncio.ensure_future(until_disconnect(receive)), asyncio.ensure_future(self._watch(send))
        try:
            await asyncio.wait({writing, *others}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                self._client_left()
                raise ClientLeft
            writing.result()
        finally:
            await cancel_all(writing, *others)

    async def _write(self, send: Send) -> None:
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await self._send(send, chunk)
        except Exception as error:
            if not self._started:
                raise
            told = error if isinstance(error, RequestError) else unexpected(error, "a stream")
            await self._send(send, Last(self._failure(told)))

    async def _send(self, send: Send, chunk: bytes) -> None:
        clock = asyncio.get_running_loop().time
        async with self._turn:
            self._last_seconds = clock()
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": chunk, "more_body": not isinstance(chunk, Last)})
            self._last_seconds = clock()

    async def _watch(self, send: Send) -> None:
        """Ping in silence; return when the client has stopped reading."""
        clock = asyncio.get_running_loop().time
        tick = min(1.0, self._limits.ping_seconds / 4, self._limits.stall_seconds / 4)
        while True:
            await asyncio.sleep(tick)
            silent_seconds = clock() - self._last_seconds
            if self._turn.locked() and silent_seconds >= self._limits.stall_seconds:
                return
            if not self._turn.locked() and silent_seconds >= self._limits.ping_seconds:
                try:
                    async with asyncio.timeout(self._limits.stall_seconds):
                        await self._send(send, PING)
                except TimeoutError:
                    return
