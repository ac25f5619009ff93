"""Ends a text at a stop string, wherever the pushes cut it.

Knows strings. Knows nothing about tokens, requests or HTTP.
"""

from collections.abc import Sequence


class StopChecker:
    """Passes text through until a stop string is complete.

    The stop string that is complete first wins; of two that end at the same character, the longer one. Text that may
    still become a stop string is held back: at most one character less than the longest. Empty stops are ignored.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = sorted((stop for stop in stops if stop), key=len, reverse=True)
        self._include_stop = include_stop
        self._held = ""
        self._stopped: str | None = None

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stopped

    def push(self, text: str) -> str:
        """What may be shown now. Nothing follows a stop string."""
        if self._stopped is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, self._stopped = min(found)
            self._held = ""
            return text[: end if self._include_stop else start]
        shown = len(text) - self._num_held(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back and did not become a stop string. Nothing is pushed after it."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """The length of the longest ending that some stop string begins with."""
        longest = min(len(text), len(self._stops[0]) - 1 if self._stops else 0)
        for length in range(longest, 0, -1):
            if any(len(stop) > length and text.endswith(stop[:length]) for stop in self._stops):
                return length
        return 0
