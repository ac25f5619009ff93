"""The story that every endpoint shares: a job becomes engine requests, their outputs become events and a bill.

Knows choices, events and usage. Knows nothing of how an endpoint spells them.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import groupby
from typing import Any

import msgspec

from ernie_serve.api.connection import cancel_all
from ernie_serve.api.events import Answer, Event, Finished, PromptScored, TextDelta
from ernie_serve.api.services import unavailable
from ernie_serve.api.telling import Choice, Job, Telling
from ernie_serve.billing.meter import Reservation
from ernie_serve.billing.prices import Usage
from ernie_serve.engine.client import EngineClient
from ernie_serve.errors import EngineFailure, EngineUnavailable, InvalidRequest
from ernie_serve.messages import EngineOutput, SamplingParams
from ernie_serve.text.tokenizer import Tokenizer


class Generation:
    """One job at work. Its events can be read once; its usage is whole when they have been.

    No more is told than the reservation covers. `finish_reason` is that of the choice that ended last,
    `began_at` when the engine began with one, `first_token_at` when the first token came, by `time.monotonic`.
    """

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, job: Job, reservation: Reservation) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._job = job
        self._reservation = reservation
        self._num_completion_tokens = 0
        self._num_reasoning_tokens = 0
        self._prompts: dict[int, tuple[int, int]] = {}  # per prompt its length, and how much of it was cached
        self._scores: defaultdict[int, asyncio.Future[PromptScored]] = defaultdict(asyncio.Future)  # by prompt
        self._begun: set[int] = set()  # prompts of which the engine has computed something
        self.finish_reason: str | None = None
        self.began_at: float | None = None
        self.first_token_at: float | None = None

    def events(self) -> AsyncGenerator[list[Event], None]:
        """The events of all choices as they happen, those of one choice in order; what comes at once is one list.

        Closing it aborts what still runs. Raises `InvalidRequest`, `EngineUnavailable` and `EngineFailure`.
        """
        choices = self._job.choices
        return self._run(choices[0]) if len(choices) == 1 else self._run_all(choices)

    async def answers(self) -> list[Answer]:
        """Every choice in one piece, in order."""
        answers = [Answer(choice.index) for choice in self._job.choices]
        async with aclosing(self.events()) as events:
            async for told in events:
                for event in told:
                    answers[event.index].add(event)
        return answers if self._job.keep is None else likeliest(self._job.choices, answers, self._job.keep)

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object. A prompt counts once, however many choices continue it."""
        num_prompt_tokens = sum(length for length, _ in self._prompts.values())
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": num_prompt_tokens + self._num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
            "completion_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
        }

    @property
    def used(self) -> Usage:
        """What was computed so far, and is paid for: of the prompts those that were begun."""
        begun = [self._prompts[index] for index in self._begun]
        return Usage(
            prompt_tokens=sum(length for length, _ in begun),
            completion_tokens=self._num_completion_tokens,
            cached_tokens=sum(cached for _, cached in begun),
            reasoning_tokens=self._num_reasoning_tokens,
        )

    async def _run(self, choice: Choice) -> AsyncGenerator[list[Event], None]:
        is_scored = choice.request.sampling.prompt_logprobs is not None
        if is_scored and not choice.is_first:  # a prompt is scored once, however many choices continue it
            scored = await self._scores[choice.prompt_index]
            yield [replace(scored, index=choice.index)]
            choice = unscored(choice)
        request = choice.request
        self._prompts.setdefault(choice.prompt_index, (len(request.prompt_token_ids), 0))
        if request.sampling.max_tokens == 0:  # nothing to make, so the engine is not asked
            self.finish_reason = "length"
            opening: list[Event] = [TextDelta(choice.index, choice.opening)] if choice.opening else []
            yield [*opening, Finished(choice.index, "length")]
            return
        telling = Telling(self._tokenizer, choice, self._job)
        try:
            async with aclosing(self._engine.generate(request)) as outputs:
                async for output in outputs:
                    require_success(output, request.sampling, self._job.grammar_param)
                    self._note_prompt(choice, output)
                    told = output if choice.prompt_only else await self._paid(output)
                    num_told, num_thought = telling.num_tokens, telling.num_reasoning
                    events = telling.push(told)
                    self._num_reasoning_tokens += telling.num_reasoning - num_thought
                    if not choice.prompt_only:  # what came behind the end is not paid for
                        self._num_completion_tokens -= len(told.token_ids) - (telling.num_tokens - num_told)
                    if not events:
                        continue
                    first, end = events[0], events[-1]
                    if isinstance(first, PromptScored):
                        self._scores[choice.prompt_index].set_result(first)
                    if isinstance(end, Finished):
                        self.finish_reason = end.reason
                        events[-1] = replace(end, unpaid=told is not output and end.reason == "length")
                    yield events
                    if isinstance(end, Finished):
                        return
            raise EngineFailure("The engine ended this request without a reason.")
        except EngineUnavailable as error:
            raise unavailable(self._engine, error) from None

    async def _paid(self, output: EngineOutput) -> EngineOutput:
        """The output, counted; only as far as it is paid for, and the last one, where that does not reach."""
        count = len(output.token_ids)
        if count and self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self._num_completion_tokens += count
        if await self._reservation.cover(self._num_completion_tokens):
            return output
        excess = min(count, self._num_completion_tokens - self._reservation.covered)  # other choices count as well
        self._num_completion_tokens -= excess
        kept = count - excess
        ids, logprobs = output.token_ids[:kept], output.logprobs[:kept]
        return msgspec.structs.replace(
            output, token_ids=ids, logprobs=logprobs, finish_reason="length", stop_token_id=None
        )

    def _note_prompt(self, choice: Choice, output: EngineOutput) -> None:
        self._begun.add(choice.prompt_index)
        self.began_at = self.began_at or output.began_at
        if output.num_cached_tokens and choice.is_first:
            length = len(choice.request.prompt_token_ids)
            self._prompts[choice.prompt_index] = (length, output.num_cached_tokens)

    async def _run_all(self, choices: list[Choice]) -> AsyncGenerator[list[Event], None]:
        """Run every choice in a task of its own; a reader that is slow slows them all."""
        queue: asyncio.Queue[list[Event] | BaseException] = asyncio.Queue(maxsize=4 * len(choices))
        tasks = [asyncio.ensure_future(self._pump(choice, queue)) for choice in choices]
        running = len(tasks)
        try:
            while running:
                events = await queue.get()
                if isinstance(events, BaseException):
                    raise events
                running -= isinstance(events[-1], Finished)
                yield events
        finally:
            await cancel_all(*tasks)

    async def _pump(self, choice: Choice, queue: asyncio.Queue[list[Event] | BaseException]) -> None:
        try:
            async with aclosing(self._run(choice)) as told:
                async for events in told:
                    await queue.put(events)
        except Exception as error:
            await queue.put(error)


def unscored(choice: Choice) -> Choice:
    """The choice without what scoring its prompt takes of the engine, which is all where nothing else was asked for."""
    sampling = msgspec.structs.replace(choice.request.sampling, prompt_logprobs=None)
    if choice.prompt_only:
        sampling = msgspec.structs.replace(sampling, max_tokens=0)
    return replace(choice, request=msgspec.structs.replace(choice.request, sampling=sampling), prompt_only=False)


def require_success(output: EngineOutput, sampling: SamplingParams, grammar_param: str) -> None:
    """Raise `InvalidRequest` or `EngineFailure` if the engine gave the request up."""
    if output.finish_reason == "error":
        if output.error_code == "no_token_left":
            raise contradiction(sampling, grammar_param)
        raise EngineFailure(output.error or "The engine failed this request.")


def contradiction(sampling: SamplingParams, grammar_param: str) -> InvalidRequest:
    """What is told of a request whose own constraints forbid every token; `param` names one to loosen."""
    given = {
        "allowed_token_ids": bool(sampling.allowed_token_ids),
        "bad_words": bool(sampling.bad_words),
        grammar_param: sampling.grammar is not None,
    }
    names = [name for name, is_given in given.items() if is_given]
    listed = " and ".join(f"`{name}`" for name in names) or "The request's constraints"
    told = f"{listed} leave no token that the answer could go on with. Loosen what is forbidden."
    return InvalidRequest(told, param=names[0] if names else None)


def likeliest(choices: Sequence[Choice], answers: Sequence[Answer], keep: int) -> list[Answer]:
    """The `keep` answers to each prompt whose tokens are likeliest on average, best first, numbered anew."""
    kept: list[Answer] = []
    for _, group in groupby(zip(choices, answers, strict=True), key=lambda pair: pair[0].prompt_index):
        ranked = sorted((answer for _, answer in group), key=lambda answer: -answer.mean_logprob)
        kept += ranked[:keep]
    for index, answer in enumerate(kept):
        answer.index = index
    return kept
