"""Responses that may be asked for again or gone on from: bounded, expiring, and each seen by its own key alone.

Knows responses as JSON objects. Knows nothing of how they are made. What is kept here is in memory and ends with the
server; `response_file` keeps them over a restart.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import orjson

Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kept:
    """A response, the items it was asked for with, and all items of the conversation up to its own."""

    body: dict[str, Any]
    input_items: list[Item]
    conversation: list[Item]


class KeptResponses(Protocol):
    """Where responses are kept. Safe for threads; nothing here waits for a disk to write."""

    def put(self, owner: bytes, kept: Kept) -> None:
        """Keep a response under its id, if there is room for it at all."""

    def get(self, owner: bytes, response_id: str) -> Kept | None:
        """The response, if it is kept and this owner's."""

    def delete(self, owner: bytes, response_id: str) -> bool:
        """Forget the response, if it is kept and this owner's; whether it was."""

    def close(self) -> None:
        """Finish what was begun. Nothing is asked for afterwards."""


@dataclass(frozen=True, slots=True)
class _Entry:
    owner: bytes
    kept: Kept
    num_bytes: int
    expires_seconds: float


class ResponseStore:
    """At most so many bytes and responses; the oldest make room. Safe for threads."""

    def __init__(
        self,
        *,
        max_responses: int = 10_000,
        max_bytes: int = 64 << 20,
        keep_seconds: float = 24 * 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._keep_seconds = keep_seconds
        self._clock = clock
        self._lock = Lock()
        self._entries: dict[str, _Entry] = {}  # the oldest first
        self._num_bytes = 0

    def put(self, owner: bytes, kept: Kept) -> None:
        """Keep a response under its id. One that is larger than all the room is not kept."""
        num_bytes = len(orjson.dumps([kept.body, kept.conversation]))
        with self._lock:
            now = self._clock()
            self._forget_expired(now)
            if num_bytes > self._max_bytes:
                return
            while self._entries and (
                len(self._entries) >= self._max_responses or self._num_bytes + num_bytes > self._max_bytes
            ):
                self._forget(next(iter(self._entries)))
            self._entries[kept.body["id"]] = _Entry(owner, kept, num_bytes, now + self._keep_seconds)
            self._num_bytes += num_bytes

    def get(self, owner: bytes, response_id: str) -> Kept | None:
        """The response, if it is kept and this owner's."""
        with self._lock:
            self._forget_expired(self._clock())
            entry = self._entries.get(response_id)
            return entry.kept if entry is not None and entry.owner == owner else None

    def delete(self, owner: bytes, response_id: str) -> bool:
        """Forget the response, if it is kept and this owner's; whether it was."""
        with self._lock:
            entry = self._entries.get(response_id)
            if entry is None or entry.owner != owner:
                return False
            self._forget(response_id)
            return True

    def close(self) -> None:
        """There is nothing to finish."""

    def _forget_expired(self, now: float) -> None:
        while self._entries:
            oldest = next(iter(self._entries))
            if self._entries[oldest].expires_seconds > now:
                return
            self._forget(oldest)

    def _forget(self, response_id: str) -> None:
        self._num_bytes -= self._entries.pop(response_id).num_bytes
