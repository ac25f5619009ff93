"""Ends an answer at a stop string of its content: never in reasoning, never in a call, never in the frames between.

Knows events and the log-probabilities of one choice. Knows nothing of how a model spells any of them.
"""

from collections.abc import Sequence
from dataclasses import replace

from ernie_serve.api.choice_text import Placed
from ernie_serve.api.events import Event, TextDelta
from ernie_serve.text.stop import StopChecker


class ContentStops:
    """Passes the events of one choice through until its content holds a stop string.

    Content that may still become one is held back until more content, an event of another kind or the end decides: a
    stop string does not reach over a call. The log-probabilities of what is held back wait with it.
    """

    def __init__(self, index: int, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._index = index
        self._checker = StopChecker(stops, include_stop=include_stop)
        self._num_given = 0  # characters of content
        self._num_shown = 0
        self._waiting: list[tuple[int, Placed]] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the content."""
        return self._checker.stopped is not None

    def push(
        self, events: Sequence[Event], placed: Sequence[Placed], *, looking: bool = True
    ) -> tuple[list[Event], list[Placed]]:
        """What one token lets us tell. Without `looking` its content passes as it is."""
        self._waiting += [(self._num_given, each) for each in placed]
        told: list[Event] = []
        for event in events:
            if self.stopped:
                break
            if isinstance(event, TextDelta):
                self._num_given += len(event.text)
                text = self._checker.push(event.text) if looking else event.text
                told += self._shown(text, event)
            else:
                told += [*self._shown(self._checker.flush()), event]
        return told, self._ready()

    def finish(self) -> tuple[list[Event], list[Placed]]:
        """What was held back and did not become a stop string."""
        return self._shown(self._checker.flush()), self._ready()

    def _shown(self, text: str, event: TextDelta | None = None) -> list[Event]:
        self._num_shown += len(text)
        return [replace(event or TextDelta(self._index, ""), text=text)] if text else []

    def _ready(self) -> list[Placed]:
        """Those of tokens whose content is shown; while nothing is held back, those without content too."""
        everything = not self.stopped and self._num_given == self._num_shown
        count = sum(everything or place < self._num_shown for place, _ in self._waiting)
        ready, self._waiting = [placed for _, placed in self._waiting[:count]], self._waiting[count:]
        return ready
