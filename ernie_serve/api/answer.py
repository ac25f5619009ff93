"""From a POST to its answer, the same for every endpoint that makes text.

Knows the order of things: read, prepare, generate, then tell it as a stream or in one piece. Knows no field and no
shape of an answer; an endpoint brings both.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.auth import caller_of
from ernie_serve.api.billed import Billed, claim_of
from ernie_serve.api.body import parse_object, read_body
from ernie_serve.api.connection import while_connected
from ernie_serve.api.events import Answer, Event, Finished
from ernie_serve.api.jobs import kept_apart
from ernie_serve.api.services import Services
from ernie_serve.api.sse import EventStream, Last
from ernie_serve.api.telling import Job
from ernie_serve.api.whole import JsonAnswer, WholeAnswer
from ernie_serve.billing.meter import AlreadyAnswered
from ernie_serve.errors import InvalidRequest, RequestError

T = TypeVar("T")

INLINE_BYTES = 4096
"""Bodies up to this size are read, templated and tokenised at once; larger ones in a thread."""

INLINE_SCORES = 1000
"""Answers with the log-probabilities of so many tokens are spelled at once; larger ones in a thread."""


class Format(Protocol):
    """How an endpoint spells the events of a job. What belongs to a stream is whole server-sent events, or nothing."""

    def opening(self) -> bytes:
        """What a stream begins with."""

    def count(self, usage: dict[str, Any]) -> None:
        """What the chunks from here on tell as the usage so far; never called where none was asked for."""

    def chunk(self, event: Event) -> bytes:
        """An event of a stream."""

    def closing(self, usage: dict[str, Any]) -> bytes:
        """What a stream ends with."""

    def failure(self, error: RequestError) -> bytes:
        """What a stream that breaks ends with."""

    def whole(self, answers: list[Answer]) -> Callable[[dict[str, Any]], bytes]:
        """What makes the body of an answer in one piece of its usage, which is known last."""


Prepare = Callable[[Services, dict[str, Any]], tuple[Job, Format]]
"""Checks a request and makes its job; may take long, so it may run in a thread."""


async def answer(
    services: Services, request: Request, prepare: Prepare, *, is_light: Callable[[bytes], bool] = lambda body: True
) -> Response:
    """The answer to a request, whose body is read at once where it is small and `is_light`.

    Raises `RequestError`, and `ClientLeft` when nobody waits any more.
    """
    body = await read_body(request, services.limits)
    services.require_ready()
    job, form = await prepared(services, request, body, prepare, is_light=is_light)
    caller = caller_of(request)
    if caller.account_id:
        job = kept_apart(job, caller.account_id)
    await require_grammar(services, request, job)
    claim = claim_of(request, body) if services.meter.charges else None
    billed = Billed(services, caller, job, claim)
    if job.stream:
        return EventStream(_chunks(billed, job, form), services.limits, form.failure, billed.client_left)
    return WholeAnswer(partial(_whole, services, billed, form), billed.client_left)


async def prepared(
    services: Services,
    request: Request,
    body: bytes,
    prepare: Callable[[Services, dict[str, Any]], T],
    *,
    is_light: Callable[[bytes], bool] = lambda body: True,
) -> T:
    """What is made of a body, in a thread if that may take long. Raises `RequestError` and `ClientLeft`."""
    if len(body) <= INLINE_BYTES and is_light(body):
        return prepare(services, parse_object(body))
    work = asyncio.to_thread(lambda: prepare(services, parse_object(body)))
    return await while_connected(request.receive, work)


async def require_grammar(services: Services, request: Request, job: Job) -> None:
    """Raise `InvalidRequest`, naming the field, if the grammar that binds the answers cannot be compiled."""
    grammar = job.choices[0].request.sampling.grammar
    if grammar is None:
        return
    try:
        await while_connected(request.receive, asyncio.to_thread(services.check_grammar, grammar))
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=error.param or job.grammar_param) from None


async def _whole(services: Services, billed: Billed, form: Format) -> Response:
    """The answer, once it is charged, or the earlier one to the same question."""
    try:
        return JsonAnswer(await _body(billed, form))
    except AlreadyAnswered as earlier:
        again = await services.replays.get(earlier.request_id)
        return JsonAnswer(again, headers={"idempotent-replayed": "true"})


async def _body(billed: Billed, form: Format) -> bytes:
    """The body, once it is charged. A client that leaves at that point may ask for it again, with a key for that."""

    async def finish() -> bytes:
        body = None
        try:
            await asyncio.sleep(0)  # others that ended with the same step are charged together with this one
            told = await _spelled(form, answers)  # and all are spelled while the charges are written
            body = told(await billed.usage())
            return body
        finally:
            billed.keep(body)

    async with billed:
        answers = await billed.generation.answers()
        billed.charge()
        return await (asyncio.shield(finish()) if billed.claimed else finish())


async def _spelled(form: Format, answers: list[Answer]) -> Callable[[dict[str, Any]], bytes]:
    """`form.whole`, in a thread where it is long."""
    scored = sum(len(each.logprobs) + len(each.prompt_logprobs) for each in answers)
    return form.whole(answers) if scored <= INLINE_SCORES else await asyncio.to_thread(form.whole, answers)


async def _chunks(billed: Billed, job: Job, form: Format) -> AsyncGenerator[bytes, None]:
    """The stream. Its end waits until the whole is charged; what its last choice still tells goes before."""
    next_, last, num_open = form.opening(), b"", len(job.choices)
    async with billed:
        async with aclosing(billed.generation.events()) as told:
            async for events in told:
                num_open -= isinstance(events[-1], Finished)
                if job.usage_in_chunks:
                    form.count(billed.generation.usage)
                chunks = [form.chunk(event) for event in events]
                last = b"" if num_open else chunks.pop()
                next_ += b"".join(chunks)
                if num_open and next_:
                    billed.has_told = True
                    yield next_
                    next_ = b""
        billed.charge()
        if next_:
            await asyncio.sleep(0)  # others that ended with the same step are charged together with this one
            yield next_  # and this is sent while the charges are written
        usage = await billed.usage()
    yield Last(last + form.closing(usage))
