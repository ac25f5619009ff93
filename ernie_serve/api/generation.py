"""The story that every endpoint shares: a job becomes engine requests, their outputs become events and a bill.

Knows choices, events and usage. Knows nothing of how an endpoint spells them: the answer in one piece is a fold
over the same events that a stream sends.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ernie_serve.api.choice_text import ChoiceText, Placed, TextOptions
from ernie_serve.api.connection import cancel_all
from ernie_serve.engine.client import EngineClient
from ernie_serve.errors import EngineFailure, EngineUnavailable
from ernie_serve.messages import EngineRequest
from ernie_serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer to one prompt, the first of its prompt or a further one.

    `opening` is text that stands before the answer's own.
    """

    index: int
    prompt_index: int
    is_first: bool
    request: EngineRequest
    opening: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything one HTTP request asks of the engine."""

    id: str
    choices: list[Choice]
    text: TextOptions
    stream: bool
    include_usage: bool


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of a choice, and the log-probabilities of its tokens where they are wanted."""

    index: int
    text: str
    logprobs: list[Placed]


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a choice: "stop" or "length"."""

    index: int
    reason: str


Event = TextDelta | Finished


@dataclass(slots=True)
class Answer:
    """One choice in one piece: the fold of its events."""

    index: int
    text: str = ""
    logprobs: list[Placed] = field(default_factory=list)
    reason: str = ""


class Generation:
    """One job at work. Its events can be read once; its usage is whole when they have been."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, job: Job) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._job = job
        self._num_completion_tokens = 0
        self._prompts: dict[int, tuple[int, int]] = {}  # per prompt its length, and how much of it was cached

    def events(self) -> AsyncGenerator[Event, None]:
        """The events of all choices as they happen, those of one choice in order.

        Closing it aborts what still runs. Raises `EngineUnavailable` and `EngineFailure`.
        """
        choices = self._job.choices
        return self._run(choices[0]) if len(choices) == 1 else self._run_all(choices)

    async def answers(self) -> list[Answer]:
        """Every choice in one piece, in order."""
        answers = [Answer(choice.index) for choice in self._job.choices]
        async with aclosing(self.events()) as events:
            async for event in events:
                answer = answers[event.index]
                if isinstance(event, Finished):
                    answer.reason = event.reason
                else:
                    answer.text += event.text
                    answer.logprobs += event.logprobs
        return answers

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object. A prompt counts once, however many choices continue it."""
        num_prompt_tokens = sum(length for length, _ in self._prompts.values())
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": num_prompt_tokens + self._num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
        }

    async def _run(self, choice: Choice) -> AsyncGenerator[Event, None]:
        request, opening = choice.request, choice.opening
        prompt_length = len(request.prompt_token_ids)
        self._prompts.setdefault(choice.prompt_index, (prompt_length, 0))
        if request.sampling.max_tokens == 0:  # nothing to make, so the engine is not asked
            if opening:
                yield TextDelta(choice.index, opening, [])
            yield Finished(choice.index, "length")
            return
        text = ChoiceText(self._tokenizer, request.prompt_token_ids, self._job.text)
        finished = False
        try:
            async with aclosing(self._engine.generate(request)) as outputs:
                async for output in outputs:
                    reason = output.finish_reason
                    finished = reason is not None
                    if reason == "error":
                        raise EngineFailure(output.error or "The engine failed this request.")
                    if reason == "abort":
                        raise EngineUnavailable("The engine gave this request up.", retry_after_seconds=1)
                    self._num_completion_tokens += len(output.token_ids)
                    if output.num_cached_tokens and choice.is_first:
                        self._prompts[choice.prompt_index] = (prompt_length, output.num_cached_tokens)
                    shown, logprobs = text.push(output)
                    if opening and (shown or finished):
                        shown, opening = opening + shown, ""
                    if shown or logprobs:
                        yield TextDelta(choice.index, shown, logprobs)
                    if text.stopped:
                        yield Finished(choice.index, "stop")
                        return
                    if reason is not None:
                        yield Finished(choice.index, reason)
                        return
            raise EngineFailure("The engine ended this request without a reason.")
        finally:
            if not finished:
                self._engine.abort(request.request_id)

    async def _run_all(self, choices: list[Choice]) -> AsyncGenerator[Event, None]:
        """Run every choice in a task of its own; a reader that is slow slows them all."""
        queue: asyncio.Queue[Event | BaseException] = asyncio.Queue(maxsize=4 * len(choices))
        tasks = [asyncio.ensure_future(self._pump(choice, queue)) for choice in choices]
        running = len(tasks)
        try:
            while running:
                event = await queue.get()
                if isinstance(event, BaseException):
                    raise event
                running -= isinstance(event, Finished)
                yield event
        finally:
            await cancel_all(*tasks)

    async def _pump(self, choice: Choice, queue: asyncio.Queue[Event | BaseException]) -> None:
        try:
            async with aclosing(self._run(choice)) as events:
                async for event in events:
                    await queue.put(event)
        except Exception as error:
            await queue.put(error)
