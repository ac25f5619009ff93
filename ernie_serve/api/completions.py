"""POST /v1/completions: continue a text.

Knows the endpoint's prompts and its shapes. Knows nothing of how text is made.
"""

import time
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.answer import Format, answer
from ernie_serve.api.generation import Answer, Event, Finished, Job
from ernie_serve.api.jobs import make_job
from ernie_serve.api.logprobs import completion_logprobs
from ernie_serve.api.schema.completion import DEFAULT_MAX_TOKENS, CompletionRequest, read_prompts
from ernie_serve.api.schema.validation import validated
from ernie_serve.api.services import Services
from ernie_serve.errors import InvalidRequest


def router(services: Services) -> APIRouter:
    """The endpoint's route."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        return await answer(services, request, prepare)

    return routes


def prepare(services: Services, body: dict[str, Any]) -> tuple[Job, Format]:
    """Check a request and tokenise its prompts. Raises `RequestError`."""
    fields = validated(CompletionRequest, body)
    services.require_model(fields.model)
    fields.require_supported()
    tokenizer = services.tokenizer
    prompts = read_prompts(fields.prompt, tokenizer.vocab_size, services.limits.max_prompts)
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    if not all(ids):
        raise InvalidRequest("`prompt` holds no token. Send some text.", param="prompt")
    openings: list[str] = []
    if fields.echo:
        skip = fields.skip_special_tokens is not False
        openings = [p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=skip) for p in prompts]
    job = make_job(
        services,
        fields,
        ids,
        chat=False,
        prompt_param="prompt",
        default_max=DEFAULT_MAX_TOKENS,
        openings=openings,
    )
    return job, CompletionFormat(services, job)


class CompletionFormat:
    """OpenAI's completion objects. What stays the same from chunk to chunk is encoded once."""

    def __init__(self, services: Services, job: Job) -> None:
        self._tokenizer = services.tokenizer
        self._with_logprobs = job.text.logprobs
        self._about = {
            "id": job.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": services.model_name,
            "system_fingerprint": services.fingerprint,
        }
        self._head = b"data: " + orjson.dumps(self._about)[:-1] + b',"choices":['
        self._tail = b',"usage":null}\n\n' if job.include_usage else b"}\n\n"

    def chunk(self, event: Event) -> bytes:
        """An event of a stream."""
        if isinstance(event, Finished):
            return b'%b{"index":%d,"text":"","logprobs":null,"finish_reason":"%b"}]%b' % (
                self._head,
                event.index,
                event.reason.encode(),
                self._tail,
            )
        logprobs = (
            orjson.dumps(completion_logprobs(self._tokenizer, event.logprobs)) if self._with_logprobs else b"null"
        )
        return b'%b{"index":%d,"text":%b,"logprobs":%b,"finish_reason":null}]%b' % (
            self._head,
            event.index,
            orjson.dumps(event.text),
            logprobs,
            self._tail,
        )

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        """The last chunk of a stream: no choices, and what it all came to."""
        return b"data: %b\n\n" % orjson.dumps({**self._about, "choices": [], "usage": usage})

    def whole(self, answers: list[Answer], usage: dict[str, Any]) -> bytes:
        """The body of an answer in one piece."""
        choices = [
            {
                "index": each.index,
                "text": each.text,
                "logprobs": completion_logprobs(self._tokenizer, each.logprobs) if self._with_logprobs else None,
                "finish_reason": each.reason,
            }
            for each in answers
        ]
        return orjson.dumps({**self._about, "choices": choices, "usage": usage})
