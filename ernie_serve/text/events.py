"""What an answer is made of, piece by piece, and the message that the pieces add up to.

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
    """More of a call's arguments: JSON text as the model wrote it. Together it is a prefix of a JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The arguments are a whole JSON object. A call that is cut off or malformed has no end."""

    index: int


Event = ReasoningDelta | ContentDelta | CallBegin | CallArguments | CallEnd


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call. `arguments` is the text of a JSON object, and only the beginning of one where not `complete`."""

    id: str
    name: str
    arguments: str
    complete: bool


@dataclass(frozen=True, slots=True)
class Message:
    """A whole answer. `None` where there was no content or no reasoning at all."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


def fold(events: Iterable[Event]) -> Message:
    """The message that a stream's events tell."""
    content: list[str] = []
    reasoning: list[str] = []
    begun: list[CallBegin] = []
    arguments: list[list[str]] = []
    ended: set[int] = set()
    for event in events:
        match event:
            case ContentDelta(text):
                content.append(text)
            case ReasoningDelta(text):
                reasoning.append(text)
            case CallBegin():
                begun.append(event)
                arguments.append([])
            case CallArguments(index, text):
                arguments[index].append(text)
            case CallEnd(index):
                ended.add(index)
    calls = (
        ToolCall(call.id, call.name, "".join(texts), call.index in ended)
        for call, texts in zip(begun, arguments, strict=True)
    )
    return Message("".join(content) or None, "".join(reasoning) or None, tuple(calls))


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbours of one kind joined: what does not depend on how the text was cut."""
    result: list[Event] = []
    for _, group in groupby(events, key=lambda event: (type(event), getattr(event, "index", None))):
        first, *others = group
        if isinstance(first, CallBegin | CallEnd):
            result += [first, *others]
            continue
        text = "".join([first.text, *(other.text for other in others if not isinstance(other, CallBegin | CallEnd))])
        result.append(CallArguments(first.index, text) if isinstance(first, CallArguments) else type(first)(text))
    return result
