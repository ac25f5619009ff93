"""POST /v1/chat/completions: the next turn of a conversation.

Knows the endpoint's messages. Knows nothing of how text is made or spelled.
"""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.answer import Format, answer
from ernie_serve.api.chat_format import ChatFormat
from ernie_serve.api.jobs import make_job
from ernie_serve.api.prompts import chat_prompt
from ernie_serve.api.sampling import truncated
from ernie_serve.api.schema.chat import ChatRequest
from ernie_serve.api.schema.messages import read_messages
from ernie_serve.api.schema.structure import read_structure
from ernie_serve.api.schema.validation import validated
from ernie_serve.api.services import Services
from ernie_serve.api.shaping import reasoning_budget, shape_chat
from ernie_serve.api.telling import Job


def router(services: Services) -> APIRouter:
    """The endpoint's route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        return await answer(services, request, prepare)

    return routes


def prepare(services: Services, body: dict[str, Any]) -> tuple[Job, Format]:
    """Check a request and render its conversation. Raises `RequestError`."""
    fields = validated(ChatRequest, body)
    services.require_model(fields.model)
    fields.require_supported()
    messages = read_messages(fields.messages)
    use = fields.tool_use
    grammar, param = read_structure(fields.response_format, fields.structured_outputs)
    ids = truncated(chat_prompt(services, messages, use, fields), fields, services.context_length)
    budget = reasoning_budget(fields.reasoning_tokens, fields.template_variables)
    shape = shape_chat(services, ids, use, grammar, param, budget)
    job = make_job(services, fields, [ids], chat=True, prompt_param="messages", default_max=None, shape=shape)
    return job, ChatFormat(services, job, fields.told_tier)
