"""What an answer is made of, piece by piece.

Knows reasoning, content and tool calls. Knows nothing of how a model spells them, nor of HTTP.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call begins: its place among the answer's calls, its id, and the tool's name, whole."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: JSON text as the model wrote it.

    Together it is a JSON object, or the beginning of one where the call is cut off or malformed.
    """

    index: int
    text: str


Event = ReasoningDelta | ContentDelta | CallBegin | CallArguments


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbours of one kind joined: what does not depend on how the text was cut."""
    result: list[Event] = []
    for _, group in groupby(events, key=lambda event: (type(event), getattr(event, "index", None))):
        first, *others = group
        if isinstance(first, CallBegin):
            result += [first, *others]
            continue
        text = "".join([first.text, *(other.text for other in others if not isinstance(other, CallBegin))])
        result.append(CallArguments(first.index, text) if isinstance(first, CallArguments) else type(first)(text))
    return result
