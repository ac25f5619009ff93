"""The message that the events of an answer's text add up to."""

from collections.abc import Iterable
from typing import NamedTuple

from ernie_serve.text.events import CallArguments, CallBegin, ContentDelta, Event, ReasoningDelta


class Message(NamedTuple):
    """`None` where there was no content or no reasoning at all. A call is a name and its arguments' text."""

    reasoning: str | None
    content: str | None
    calls: list[tuple[str, str]]


def fold(events: Iterable[Event]) -> Message:
    reasoning, content = "", ""
    calls: list[tuple[str, str]] = []
    for event in events:
        match event:
            case ReasoningDelta(text):
                reasoning += text
            case ContentDelta(text):
                content += text
            case CallBegin(_, _, name):
                calls.append((name, ""))
            case CallArguments(index, text):
                calls[index] = (calls[index][0], calls[index][1] + text)
    return Message(reasoning or None, content or None, calls)
