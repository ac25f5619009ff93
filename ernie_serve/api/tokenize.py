"""POST /tokenize and /detokenize: what a prompt costs, and what ids say.

Knows both endpoints' shapes. No engine is asked, so they answer while it loads.
"""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from ernie_serve.api.answer import prepared
from ernie_serve.api.body import read_body
from ernie_serve.api.prompts import chat_prompt
from ernie_serve.api.schema.fields import require_token_ids
from ernie_serve.api.schema.messages import read_messages
from ernie_serve.api.schema.tokenize import DetokenizeRequest, TokenizeRequest
from ernie_serve.api.schema.validation import validated
from ernie_serve.api.services import Services
from ernie_serve.api.whole import JsonAnswer


def router(services: Services) -> APIRouter:
    """The endpoints' routes."""
    routes = APIRouter()

    @routes.post("/tokenize")
    async def tokenize(request: Request) -> JsonAnswer:
        body = await read_body(request, services.limits)
        return JsonAnswer(await prepared(services, request, body, tokenized))

    @routes.post("/detokenize")
    async def detokenize(request: Request) -> JsonAnswer:
        body = await read_body(request, services.limits)
        return JsonAnswer(await prepared(services, request, body, detokenized))

    return routes


def tokenized(services: Services, body: dict[str, Any]) -> dict[str, Any]:
    """The ids of a prompt, as it would reach the engine. Raises `RequestError`."""
    fields = validated(TokenizeRequest, body)
    if fields.model is not None:
        services.require_model(fields.model)
    fields.require_supported()
    tokenizer = services.tokenizer
    if fields.prompt is not None:
        ids = tokenizer.encode(fields.prompt)
    else:
        ids = chat_prompt(services, read_messages(fields.messages), fields.tool_use, fields)
    return {
        "count": len(ids),
        "max_model_len": services.context_length,
        "tokens": ids,
        "token_strs": [tokenizer.token_text(token_id) for token_id in ids] if fields.return_token_strs else None,
    }


def detokenized(services: Services, body: dict[str, Any]) -> dict[str, Any]:
    """The text of ids, control tokens included. Raises `RequestError`."""
    fields = validated(DetokenizeRequest, body)
    if fields.model is not None:
        services.require_model(fields.model)
    require_token_ids(fields.tokens, services.tokenizer.vocab_size, "tokens")
    return {"prompt": services.tokenizer.decode(fields.tokens, skip_special_tokens=False)}
