import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from ernie_serve.api.connection import ClientLeft
from ernie_serve.api.services import Limits
from ernie_serve.api.sse import EventStream, Last
from ernie_serve.errors import EngineFailure


class Connection:
    """A client of a stream: what it was sent, and when it leaves or stops reading."""

    def __init__(self, *, leave_after: int | None = None, stall_after: int | None = None) -> None:
        self.sent: list[Any] = []
        self._left = asyncio.Event()
        self._leave_after = leave_after
        self._stall_after = stall_after

    async def receive(self) -> Any:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self._stall_after is not None and len(self.bodies) >= self._stall_after:
            await asyncio.Event().wait()
        self.sent.append(message)
        if self._leave_after is not None and len(self.bodies) >= self._leave_after:
            self._left.set()

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent if message["type"] == "http.response.body"]


class Chunks:
    """A source of chunks that fails or waits on request, and knows whether it was closed."""

    def __init__(self, *chunks: bytes, then: Exception | None = None, forever: bool = False) -> None:
        self._chunks, self._then, self._forever = chunks, then, forever
        self.closed = False
        self.given = 0

    async def __call__(self) -> AsyncGenerator[bytes, None]:
        try:
            for chunk in self._chunks:
                await asyncio.sleep(0)
                self.given += 1
                yield chunk
            if self._then is not None:
                raise self._then
            if self._forever:
                await asyncio.Event().wait()
        finally:
            self.closed = True


def stream(chunks: Chunks, limits: Limits | None = None, **client: Any) -> Connection:
    """Send a stream of chunks to a client."""

    async def run() -> Connection:
        connection = Connection(**client)
        response = EventStream(chunks(), limits or Limits())
        try:
            await response({"type": "http"}, connection.receive, connection.send)
        except ClientLeft:
            connection.sent.append({"type": "left"})
        return connection

    return asyncio.run(run())


def test_stream_is_its_chunks() -> None:
    connection = stream(Chunks(b"data: 1\n\n", b"data: 2\n\n", Last(b"data: 3\n\n")))
    assert connection.bodies == [b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n"]
    start = connection.sent[0]
    headers = dict(start["headers"])
    assert start["status"] == 200
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"cache-control"] == b"no-cache"
    assert b"content-length" not in headers
    assert [message.get("more_body") for message in connection.sent[1:]] == [True, True, False]


def test_failure_before_the_first_chunk_has_its_own_status() -> None:
    with pytest.raises(EngineFailure):
        stream(Chunks(then=EngineFailure("It broke.")))


def test_failure_in_the_middle_is_an_error_event_and_no_done() -> None:
    body = b"".join(stream(Chunks(b"data: 1\n\n", then=EngineFailure("It broke."))).bodies)
    assert body == (
        b"data: 1\n\n"
        b'data: {"error":{"message":"It broke.","type":"server_error","param":null,"code":"engine_failure"}}\n\n'
    )


def test_failure_nobody_foresaw_tells_and_logs_no_text(caplog: pytest.LogCaptureFixture) -> None:
    body = b"".join(stream(Chunks(b"data: 1\n\n", then=ValueError("canary"))).bodies)
    assert b'"type":"server_error"' in body
    assert b"canary" not in body
    assert b"[DONE]" not in body
    assert "ValueError" in caplog.text
    assert "canary" not in caplog.text


def test_client_that_leaves_closes_the_chunks() -> None:
    chunks = Chunks(b"data: 1\n\n", forever=True)
    connection = stream(chunks, leave_after=1)
    assert connection.sent[-1] == {"type": "left"}
    assert chunks.closed


def test_client_that_leaves_before_the_first_chunk_is_sent_nothing() -> None:
    chunks = Chunks(forever=True)
    assert stream(chunks, leave_after=0, stall_after=0, limits=Limits(ping_seconds=0.02, stall_seconds=0.04)).sent == [
        {"type": "left"}
    ]
    assert chunks.closed


def test_silence_is_filled_with_pings(fast_limits: Limits) -> None:
    connection = stream(Chunks(forever=True), fast_limits, leave_after=3)
    assert connection.sent[0]["status"] == 200
    assert connection.bodies[:3] == [b": ping\n\n"] * 3


def test_pings_never_stand_inside_an_event(fast_limits: Limits) -> None:
    connection = stream(Chunks(b"data: 1\n\n", forever=True), fast_limits, leave_after=3)
    assert connection.bodies[:3] == [b"data: 1\n\n", b": ping\n\n", b": ping\n\n"]


def test_client_that_stops_reading_is_left_and_nothing_piles_up(fast_limits: Limits) -> None:
    chunks = Chunks(*[b"data: 1\n\n"] * 1000)
    connection = stream(chunks, fast_limits, stall_after=2)
    assert connection.sent[-1] == {"type": "left"}
    assert chunks.given <= 3
    assert chunks.closed


def test_client_that_stops_reading_in_silence_is_left(fast_limits: Limits) -> None:
    chunks = Chunks(b"data: 1\n\n", forever=True)
    assert stream(chunks, fast_limits, stall_after=1).sent[-1] == {"type": "left"}
    assert chunks.closed
