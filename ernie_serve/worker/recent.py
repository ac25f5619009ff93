"""A dictionary that forgets what has not been asked for in a while.

Knows keys and values. What it forgets, its owner can build again.
"""

from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """At most `capacity` values by key, the most recently used ones."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._values: dict[str, T] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> T | None:
        """The value, now the most recent; `None` if it was never there or is forgotten."""
        value = self._values.pop(key, None)
        if value is not None:
            self._values[key] = value
        return value

    def put(self, key: str, value: T) -> None:
        """Keep a value; the least recent one goes when there are too many."""
        self._values.pop(key, None)
        self._values[key] = value
        if len(self._values) > self.capacity:
            del self._values[next(iter(self._values))]
