"""What one choice asks of the engine, and how the engine's outputs for it become events.

Knows the text of a choice, its end, and the stream that tells reasoning and calls from the answer; where there is one,
stop strings are looked for in the content alone. Knows nothing of other choices or of how events are spelled.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec

from ernie_serve.api.choice_text import ChoiceText, Placed, TextOptions
from ernie_serve.api.content_stops import ContentStops
from ernie_serve.api.events import CallBegun, CallDelta, Event, Finished, PromptScored, ReasoningDelta, TextDelta
from ernie_serve.messages import EngineOutput, EngineRequest, TokenLogprobs
from ernie_serve.text import events as text_events
from ernie_serve.text.formats import ReasoningTokens
from ernie_serve.text.stream import AnswerStream, Start
from ernie_serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer to one prompt, the first of its prompt or a further one.

    `opening` is text that stands before the answer's own. With `prompt_only` the prompt is scored and nothing made.
    """

    index: int
    prompt_index: int
    is_first: bool
    request: EngineRequest
    opening: str = ""
    prompt_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything one HTTP request asks of the engine.

    `read` makes what reads a choice, whose answer begins at `start`; it is `None` where all text is the answer. Of the
    choices of each prompt the likeliest `keep` are told, all of them where it is `None`. `grammar_param` names the
    field that a wrong grammar comes from. `length_given` tells that the client, not the room, bounds the answers, which
    it would do in the field `length_param`.
    """

    id: str
    choices: list[Choice]
    text: TextOptions
    stream: bool
    include_usage: bool
    usage_in_chunks: bool = False
    read: Callable[[], AnswerStream] | None = None
    start: Start = "text"
    keep: int | None = None
    grammar_param: str = "response_format"
    with_token_ids: bool = False
    length_given: bool = False
    length_param: str = "max_tokens"


class Telling:
    """The outputs of one choice, told as events."""

    def __init__(self, tokenizer: Tokenizer, choice: Choice, job: Job) -> None:
        self._index = choice.index
        self._prompt_only = choice.prompt_only
        self._prompt: list[TokenLogprobs] | None = None if choice.request.sampling.prompt_logprobs is None else []
        self._stops = stops_of_content(choice.index, job)
        options = replace(job.text, stops=()) if self._stops else job.text
        self._text = ChoiceText(tokenizer, choice.request.prompt_token_ids, options)
        self._min_tokens = job.text.min_tokens
        self._num_read = 0
        self._opening = choice.opening
        self._shift = len(choice.opening)
        self._reader = job.read() if job.read else None
        self._with_token_ids = job.with_token_ids
        self._reasoning = ReasoningTokens(tokenizer, job.start) if job.read else None
        is_parted = job.text.logprobs and self._reader is not None  # among items that each have their own tokens
        may_stop = bool(job.text.stops) or (self._reader is not None and self._reader.max_calls is not None)
        self._by_token = is_parted or may_stop
        self._num_placed = 0
        self.num_tokens = 0  # told so far
        self._sum_logprobs = 0.0

    @property
    def num_reasoning(self) -> int:
        """Tokens of reasoning so far."""
        return self._reasoning.num_tokens if self._reasoning else 0

    def push(self, output: EngineOutput) -> list[Event]:
        """The events of an output; the last one, when there is nothing more to tell, is `Finished`.

        Which tokens come together is chance: those behind the end are neither told nor counted, and what belongs to a
        token is told with what it alone makes.
        """
        events: list[Event] = []
        for part in one_by_one(output) if self._by_token else [output]:
            events += self._push(part)
            if events and isinstance(events[-1], Finished):
                break
        return events

    def _push(self, output: EngineOutput) -> list[Event]:
        scored = self._score(output)
        if self._prompt_only:
            return self._without_answer(scored) if output.token_ids or output.finish_reason else []
        self._count(output)
        events, placed = self._tell(output)
        finished = self._stopped or output.finish_reason is not None or (self._reader is not None and self._reader.done)
        ids = output.token_ids if self._with_token_ids else ()
        if placed or ids:
            events = _with_tokens(events, TextDelta(self._index, "", placed, ids))
        if finished:
            mean = self._sum_logprobs / max(1, self.num_tokens)
            events.append(Finished(self._index, self._reason(output), mean))
        return [*scored, *events]

    def _score(self, output: EngineOutput) -> list[Event]:
        """The prompt's log-probabilities, once they are all there, which is when the first token is."""
        if self._prompt is None:
            return []
        self._prompt += output.prompt_logprobs
        if not output.token_ids and output.finish_reason is None:
            return []
        scored, self._prompt = PromptScored(self._index, [None, *self._prompt]), None
        return [scored]

    def _without_answer(self, scored: list[Event]) -> list[Event]:
        opening: list[Event] = [TextDelta(self._index, self._opening)] if self._opening else []
        return [*scored, *opening, Finished(self._index, "length")]

    def _count(self, output: EngineOutput) -> None:
        self.num_tokens += len(output.token_ids)
        self._sum_logprobs += sum(token.logprob for token in output.logprobs)
        if self._reasoning is not None:
            self._reasoning.push(output.token_ids)

    @property
    def _stopped(self) -> bool:
        return self._text.stopped or (self._stops is not None and self._stops.stopped)

    def _tell(self, output: EngineOutput) -> tuple[list[Event], list[Placed]]:
        """The events of an output, and the log-probabilities to tell with them."""
        if self._stops is None:
            return self._read(output)
        self._num_read += len(output.token_ids)
        events, placed = self._stops.push(*self._read(output), looking=self._num_read > self._min_tokens)
        if output.finish_reason is not None and not self._stops.stopped:
            more, tokens = self._stops.finish()
            events += more
            placed += tokens
        return events, placed

    def _read(self, output: EngineOutput) -> tuple[list[Event], list[Placed]]:
        text, placed = self._text.push(output)
        ended = self._text.stopped or output.finish_reason is not None
        if self._opening and (text or ended):
            text, self._opening = self._opening + text, ""
        if self._reader is None:
            events: list[Event] = [TextDelta(self._index, text)] if text else []
        else:
            read = self._reader.push(text) if text else []
            read += self._reader.flush() if ended else []
            events = of_choice(self._index, read)
        return events, self._of_answer(placed)

    def _of_answer(self, placed: Sequence[Placed]) -> list[Placed]:
        """The log-probabilities that belong to the answer, not to its reasoning, counted from the opening on."""
        first = self._num_placed
        self._num_placed += len(placed)
        return [(place + self._shift, token) for place, token in placed[max(0, self.num_reasoning - first) :]]

    def _reason(self, output: EngineOutput) -> str:
        reason = "stop" if self._stopped else output.finish_reason or "stop"
        return "tool_calls" if reason == "stop" and self._reader and self._reader.has_called else reason


def of_choice(index: int, read: Iterable[text_events.Event]) -> list[Event]:
    """What was read of an answer's text, as events of its choice."""
    told: list[Event] = []
    for event in read:
        match event:
            case text_events.ContentDelta(text):
                told.append(TextDelta(index, text))
            case text_events.ReasoningDelta(text):
                told.append(ReasoningDelta(index, text))
            case text_events.CallBegin(call, call_id, name):
                told.append(CallBegun(index, call, call_id, name))
            case text_events.CallArguments(call, text):
                told.append(CallDelta(index, call, text))
    return told


def stops_of_content(index: int, job: Job) -> ContentStops | None:
    """What ends a choice at a stop string of its content, where not all of its text is content."""
    if job.read is None or not job.text.stops:
        return None
    return ContentStops(index, job.text.stops, include_stop=job.text.include_stop)


def one_by_one(output: EngineOutput) -> list[EngineOutput]:
    """The same as if its tokens had come one after the other."""
    ids, logprobs = output.token_ids, output.logprobs
    if len(ids) < 2:
        return [output]
    parts = [
        EngineOutput(request_id=output.request_id, token_ids=ids[at : at + 1], logprobs=logprobs[at : at + 1])
        for at in range(len(ids) - 1)
    ]
    first = msgspec.structs.replace(parts[0], prompt_logprobs=output.prompt_logprobs)
    last = msgspec.structs.replace(output, token_ids=ids[-1:], logprobs=logprobs[-1:], prompt_logprobs=[])
    return [first, *parts[1:], last]


def _with_tokens(events: list[Event], tokens: TextDelta) -> list[Event]:
    """The events, the first text among them with these tokens; they stand alone where there is no text."""
    for number, event in enumerate(events):
        if isinstance(event, TextDelta):
            return [*events[:number], replace(tokens, text=event.text), *events[number + 1 :]]
    return [*events, tokens]
