"""Where billing takes its time from, so that a test can move it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds since 1970, and nanoseconds that never go back."""

    now: Callable[[], float] = time.time
    now_ns: Callable[[], int] = time.monotonic_ns

    def seconds(self) -> int:
        """Whole seconds since 1970."""
        return int(self.now())
