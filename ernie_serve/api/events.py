"""What happens to the choices of a request, and the answer that it all adds up to.

Knows text, reasoning, calls of functions and ends, each with the index of its choice. Knows nothing of how an endpoint
spells them: the answer in one piece is a fold over the same events that a stream sends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ernie_serve.api.choice_text import Placed
from ernie_serve.messages import TokenLogprobs


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of a choice, with its tokens and their log-probabilities where these are wanted."""

    index: int
    text: str
    logprobs: list[Placed] = field(default_factory=list)
    token_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what a choice thinks before it answers."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a function begins; `call` counts the calls of a choice from 0."""

    index: int
    call: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """More of a call's arguments, which are JSON when they are whole."""

    index: int
    call: int
    arguments: str


@dataclass(frozen=True, slots=True)
class PromptScored:
    """The log-probabilities of a choice's prompt; the first token has none, because nothing comes before it."""

    index: int
    logprobs: Sequence[TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a choice: "stop", "length" or "tool_calls". Its tokens' mean log-probability, where it was counted.

    `unpaid` tells that it ended because the next token could not be paid for.
    """

    index: int
    reason: str
    mean_logprob: float = 0.0
    unpaid: bool = False


Event = TextDelta | ReasoningDelta | CallBegun | CallDelta | PromptScored | Finished


@dataclass(slots=True)
class Call:
    """A call of a function in one piece."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Text:
    """Text before, between or behind calls, with its tokens' log-probabilities: those that came before the call did."""

    text: str
    logprobs: list[Placed] = field(default_factory=list, compare=False)


@dataclass(slots=True)
class Answer:
    """One choice in one piece: the fold of its events. `parts` are its text and its calls in their order."""

    index: int
    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    parts: list[Text | Call] = field(default_factory=list)
    logprobs: list[Placed] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()
    reason: str = ""
    mean_logprob: float = 0.0
    unpaid: bool = False

    def add(self, event: Event) -> None:
        """Take in the next event of this choice."""
        match event:
            case TextDelta():
                self.text += event.text
                self.logprobs += event.logprobs
                self.token_ids += event.token_ids
                self._say(event)
            case ReasoningDelta():
                self.reasoning += event.text
            case CallBegun():
                self.calls.append(Call(event.id, event.name))
                self.parts.append(self.calls[-1])
            case CallDelta():
                self.calls[event.call].arguments += event.arguments
            case PromptScored():
                self.prompt_logprobs = event.logprobs
            case Finished():
                self.reason, self.mean_logprob, self.unpaid = event.reason, event.mean_logprob, event.unpaid

    def _say(self, event: TextDelta) -> None:
        last = self.parts[-1] if self.parts else None
        if isinstance(last, Text):
            last.text += event.text
            last.logprobs += event.logprobs
        elif event.text:  # the tokens of a call come without
            before = self.logprobs if last is None else event.logprobs
            self.parts.append(Text(event.text, [*before]))
