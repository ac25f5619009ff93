"""The events of one answer's text, as events of its choice.

Knows both kinds of events. Knows nothing of how a model spells reasoning or calls.
"""

from collections.abc import Iterable

from ernie_serve.api.events import CallBegun, CallDelta, Event, ReasoningDelta, TextDelta
from ernie_serve.text import events as text_events
from ernie_serve.text.stream import AnswerStream


class AnswerReader:
    """Reads the text of one choice."""

    def __init__(self, index: int, stream: AnswerStream) -> None:
        self._index = index
        self._stream = stream

    @property
    def has_called(self) -> bool:
        """Whether functions were called, and every call that has begun is whole."""
        return self._stream.has_called

    @property
    def may_stop(self) -> bool:
        """Whether it can be done before the engine is."""
        return self._stream.max_calls is not None

    @property
    def done(self) -> bool:
        """Whether the last call that is wanted is whole, so that nothing more need be made."""
        return self._stream.done

    def push(self, text: str) -> list[Event]:
        """What more text lets us tell."""
        return self._of_choice(self._stream.push(text))

    def finish(self) -> list[Event]:
        """What was held back, now that no more text comes."""
        return self._of_choice(self._stream.flush())

    def _of_choice(self, events: Iterable[text_events.Event]) -> list[Event]:
        told: list[Event] = []
        for event in events:
            match event:
                case text_events.ContentDelta(text):
                    told.append(TextDelta(self._index, text))
                case text_events.ReasoningDelta(text):
                    told.append(ReasoningDelta(self._index, text))
                case text_events.CallBegin(call, call_id, name):
                    told.append(CallBegun(self._index, call, call_id, name))
                case text_events.CallArguments(call, text):
                    told.append(CallDelta(self._index, call, text))
        return told
