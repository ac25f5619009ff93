"""From a POST to its answer, the same for every endpoint that makes text.

Knows the order of things: read, prepare, generate, then tell it as a stream or in one piece. Knows no field and no
shape of an answer; an endpoint brings both.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.body import parse_object, read_body
from ernie_serve.api.connection import while_connected
from ernie_serve.api.generation import Answer, Event, Generation, Job
from ernie_serve.api.services import Services
from ernie_serve.api.sse import EventStream

INLINE_BYTES = 4096
"""Bodies up to this size are read, templated and tokenised at once; larger ones in a thread."""


class Format(Protocol):
    """How an endpoint spells the events of a job. Chunks are whole server-sent events."""

    def chunk(self, event: Event) -> bytes:
        """An event of a stream."""

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        """The last chunk of a stream, if the client asked for it."""

    def whole(self, answers: list[Answer], usage: dict[str, Any]) -> bytes:
        """The body of an answer in one piece."""


Prepare = Callable[[Services, dict[str, Any]], tuple[Job, Format]]
"""Checks a request and makes its job; may take long, so it may run in a thread."""


async def answer(services: Services, request: Request, prepare: Prepare) -> Response:
    """The answer to a request. Raises `RequestError`, and `ClientLeft` when nobody waits any more."""
    body = await read_body(request, services.limits)
    services.require_ready()
    if len(body) <= INLINE_BYTES:
        job, form = prepare(services, parse_object(body))
    else:
        work = asyncio.to_thread(lambda: prepare(services, parse_object(body)))
        job, form = await while_connected(request.receive, work)
    generation = Generation(services.engine, services.tokenizer, job)
    if job.stream:
        return EventStream(_chunks(generation, job, form), services.limits)
    answers = await while_connected(request.receive, generation.answers())
    return Response(form.whole(answers, generation.usage), media_type="application/json")


async def _chunks(generation: Generation, job: Job, form: Format) -> AsyncGenerator[bytes, None]:
    async with aclosing(generation.events()) as events:
        async for event in events:
            yield form.chunk(event)
    if job.include_usage:
        yield form.usage_chunk(generation.usage)
