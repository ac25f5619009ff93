"""Answers that are sent again to whoever repeats a request with the same `Idempotency-Key`.

Knows bodies by the id of the request they answered. They hold what was said, so they are here and never in the billing
store; they are in memory and end with the server.
"""

import asyncio
import time
from collections.abc import Callable

from ernie_serve.errors import RequestConflict


class Replays:
    """At most so many bytes, for a day; the oldest make room. Belongs to one event loop."""

    def __init__(
        self,
        *,
        max_bytes: int = 64 << 20,
        keep_seconds: float = 24 * 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._keep_seconds = keep_seconds
        self._clock = clock
        self._bodies: dict[str, tuple[float, bytes]] = {}  # the oldest first
        self._num_bytes = 0
        self._expected: dict[str, asyncio.Event] = {}

    def expect(self, request_id: str) -> None:
        """A body is about to be put, or given up; until then `get` waits for it."""
        self._expected[request_id] = asyncio.Event()

    def put(self, request_id: str, body: bytes | None) -> None:
        """Keep a body. One that is larger than all the room is not kept."""
        if expected := self._expected.pop(request_id, None):
            expected.set()
        if body is None or len(body) > self._max_bytes:
            return
        self._bodies[request_id] = (self._clock() + self._keep_seconds, body)
        self._num_bytes += len(body)
        self._forget()

    async def get(self, request_id: str) -> bytes:
        """The body that answered a request. Raises `RequestConflict` where it is not here, or no longer."""
        if expected := self._expected.get(request_id):
            await expected.wait()
        self._forget()
        kept = self._bodies.get(request_id)
        if kept is None:
            raise not_kept()
        return kept[1]

    def _forget(self) -> None:
        while self._bodies:
            oldest = next(iter(self._bodies))
            expires, body = self._bodies[oldest]
            if self._num_bytes <= self._max_bytes and expires > self._clock():
                return
            del self._bodies[oldest]
            self._num_bytes -= len(body)


def not_kept() -> RequestConflict:
    """What is told where a request was answered and the answer is not here."""
    return RequestConflict(
        "The request with this `Idempotency-Key` was answered and charged, but its answer is not kept: streams never "
        "are, and others for a day at most, by the server that made them. Send a new key to ask again."
    )
