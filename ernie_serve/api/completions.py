"""POST /v1/completions: continue a text.

Knows the endpoint's prompts and its shapes. Knows nothing of how text is made.
"""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.answer import Format, answer
from ernie_serve.api.completion_format import CompletionFormat
from ernie_serve.api.jobs import make_job
from ernie_serve.api.sampling import truncated
from ernie_serve.api.schema.completion import DEFAULT_MAX_TOKENS, CompletionRequest, read_prompts
from ernie_serve.api.schema.structure import read_structure
from ernie_serve.api.schema.validation import validated
from ernie_serve.api.services import Services
from ernie_serve.api.shaping import shape_text
from ernie_serve.api.telling import Job
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
    ids = [truncated(each, fields, services.context_length) for each in ids]
    openings: list[str] = []
    if fields.echo:
        skip, whole = fields.skip_special_tokens is not False, fields.truncate_prompt_tokens is None
        openings = [
            prompt if whole and isinstance(prompt, str) else tokenizer.decode(each, skip_special_tokens=skip)
            for prompt, each in zip(prompts, ids, strict=True)
        ]
    job = make_job(
        services,
        fields,
        ids,
        chat=False,
        prompt_param="prompt",
        default_max=DEFAULT_MAX_TOKENS,
        shape=shape_text(*read_structure(fields.response_format, fields.structured_outputs)),
        openings=openings,
    )
    return job, CompletionFormat(services, job, echo=bool(fields.echo))
