"""POST /v1/responses and what goes with it: retrieve, delete, list the input, count its tokens.

Knows the endpoints and how a response goes on from another. Knows nothing of how text is made or spelled.
"""

from typing import Any

import orjson
from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.answer import Format, answer, prepared
from ernie_serve.api.auth import key_digest
from ernie_serve.api.billed import exact
from ernie_serve.api.body import read_body
from ernie_serve.api.jobs import make_job
from ernie_serve.api.prompts import chat_prompt
from ernie_serve.api.response_format import ResponseFormat
from ernie_serve.api.response_items import RESPONSE, response_of
from ernie_serve.api.response_store import Item, Kept, KeptResponses
from ernie_serve.api.sampling import truncated
from ernie_serve.api.schema.response import ResponseRequest, flat_tools
from ernie_serve.api.schema.response_input import listed, messages_of, read_input
from ernie_serve.api.schema.structure import read_structure
from ernie_serve.api.schema.tools import ToolUse
from ernie_serve.api.schema.validation import validated
from ernie_serve.api.services import Services
from ernie_serve.api.shaping import reasoning_budget, shape_chat
from ernie_serve.api.telling import Job
from ernie_serve.api.whole import JsonAnswer
from ernie_serve.billing.money import format_usd
from ernie_serve.errors import InvalidRequest, PreviousResponseNotFound, ResponseNotFound, UnknownUrl


def router(services: Services) -> APIRouter:
    """The endpoints' routes."""
    routes = APIRouter()
    kept = services.responses

    @routes.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        return await answer(services, request, Preparation(kept, owner_of(request)).prepare, is_light=stands_alone)

    @routes.post("/v1/responses/input_tokens")
    async def count_input_tokens(request: Request) -> Response:
        body = await read_body(request, services.limits)
        count = Preparation(kept, owner_of(request)).count
        return JsonAnswer(await prepared(services, request, body, count, is_light=stands_alone))

    @routes.post("/v1/responses/compact", include_in_schema=False)  # no id, which it would be taken for
    async def compact(request: Request) -> Response:
        raise UnknownUrl(
            "/v1/responses/compact is not offered: nothing here shortens a conversation. Send fewer items."
        )

    @routes.api_route("/v1/responses/{response_id}", methods=["GET", "HEAD", "DELETE"])
    async def retrieve_response(request: Request) -> Response:
        owner, response_id = owner_of(request), request.path_params["response_id"]
        if response_id == "input_tokens":  # no id, but the path above with another method
            raise HTTPException(405, headers={"Allow": "POST"})
        if request.method == "DELETE":
            if not kept.delete(owner, response_id):
                raise not_found(response_id)
            return JsonAnswer({"id": response_id, "object": "response", "deleted": True})
        if request.query_params.get("stream", "").lower() == "true":
            raise InvalidRequest("A kept response is told in one piece. Leave out `stream`.", param="stream")
        return JsonAnswer(with_exact_cost(require_kept(kept, owner, response_id).body))

    @routes.api_route("/v1/responses/{response_id}/input_items", methods=["GET", "HEAD"])
    async def list_input_items(request: Request) -> Response:
        found = require_kept(kept, owner_of(request), request.path_params["response_id"])
        return JsonAnswer(page_of([listed(item) for item in found.input_items], dict(request.query_params)))

    return routes


def stands_alone(body: bytes) -> bool:
    """Whether a body names nothing that is kept, of which a few bytes may mean a long conversation."""
    return b"previous_response_id" not in body and b'"id"' not in body


class Preparation:
    """What one request becomes for one owner's kept responses."""

    def __init__(self, store: KeptResponses, owner: bytes) -> None:
        self._store = store
        self._owner = owner
        self._named: dict[str, list[Item]] = {}  # what the responses told that the request has named so far
        self._num_named_bytes = 0

    def prepare(self, services: Services, body: dict[str, Any]) -> tuple[Job, Format]:
        """Check a request and render its conversation. Raises `RequestError`."""
        fields = validated(ResponseRequest, body)
        given, conversation = self._conversation(services, fields)
        use = fields.tool_use
        text_format = fields.text.format if fields.text else None
        grammar, param = read_structure(text_format, fields.structured_outputs, "text.format", flat=True)
        ids = self._prompt(services, fields, conversation, use)
        budget = reasoning_budget(fields.reasoning_tokens, fields.template_variables)
        shape = shape_chat(services, ids, use, grammar, param, budget)
        job = make_job(
            services, fields, [ids], chat=True, prompt_param="input", default_max=None, shape=shape, id_prefix=RESPONSE
        )

        def keep(response: dict[str, Any]) -> None:
            if fields.store is not False:
                self._store.put(self._owner, Kept(response, given, [*conversation, *response["output"]]))

        return job, ResponseFormat(services.tokenizer, job, about(services, fields, use, job), keep)

    def count(self, services: Services, body: dict[str, Any]) -> dict[str, Any]:
        """How many tokens the same request would be asked with."""
        fields = validated(ResponseRequest, {"model": services.model_name, **body})
        _, conversation = self._conversation(services, fields)
        ids = self._prompt(services, fields, conversation, fields.tool_use)
        return {"object": "response.input_tokens", "input_tokens": len(ids)}

    def _conversation(self, services: Services, fields: ResponseRequest) -> tuple[list[Item], list[Item]]:
        """The items that were sent, and with them all that went before."""
        before: list[Item] = []
        if fields.previous_response_id is not None:
            found = self._store.get(self._owner, fields.previous_response_id)
            if found is None:
                told = f"There is no kept response {fields.previous_response_id!r}. Send the whole conversation."
                raise PreviousResponseNotFound(told, param="previous_response_id")
            before = found.conversation
        given = read_input(fields.input, lambda item_id: self._find(item_id, services.limits.max_body_bytes))
        return given, [*before, *given]

    def _find(self, item_id: str, most_bytes: int) -> Item | None:
        """An item that a kept response told. All that are named have no more bytes than could have been sent."""
        response_id = response_of(item_id)
        if response_id not in self._named:
            kept = self._store.get(self._owner, response_id)
            self._named[response_id] = kept.body["output"] if kept else []
        found = next((item for item in self._named[response_id] if item["id"] == item_id), None)
        if found is not None:
            self._num_named_bytes += len(orjson.dumps(found))
            if self._num_named_bytes > most_bytes:
                told = f"The items that `input` names have more than {most_bytes} bytes. Name fewer."
                raise InvalidRequest(told, param="input")
        return found

    def _prompt(self, services: Services, fields: ResponseRequest, conversation: list[Item], use: ToolUse) -> list[int]:
        services.require_model(fields.model)
        fields.require_supported()
        messages = messages_of(conversation, fields.instructions)
        if not messages:
            raise InvalidRequest("`input` holds no message. Send one.", param="input")
        return truncated(chat_prompt(services, messages, use, fields), fields, services.context_length)


def about(services: Services, fields: ResponseRequest, use: ToolUse, job: Job) -> dict[str, Any]:
    """What a response repeats of its request."""
    sampling = job.choices[0].request.sampling
    reasoning = fields.reasoning
    return {
        "model": services.model_name,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "max_tool_calls": fields.max_tool_calls,
        "metadata": fields.metadata or {},
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": fields.previous_response_id,
        "prompt_cache_key": fields.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
        "safety_identifier": fields.safety_identifier,
        "service_tier": "default",
        "store": fields.store is not False,
        "temperature": sampling.temperature,
        "text": {"format": (fields.text and fields.text.format) or {"type": "text"}},
        "tool_choice": "auto" if fields.tool_choice is None else fields.tool_choice,
        "tools": flat_tools(use),
        "top_logprobs": fields.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": fields.user,
    }


def owner_of(request: Request) -> bytes:
    """Whose responses a request may see: those of its key, told apart by a digest."""
    return key_digest(request.scope)


def require_kept(store: KeptResponses, owner: bytes, response_id: str) -> Kept:
    """The response of this id. Raises `ResponseNotFound`."""
    found = store.get(owner, response_id)
    if found is None:
        raise not_found(response_id)
    return found


def with_exact_cost(body: dict[str, Any]) -> dict[str, Any]:
    """A kept response whose cost is spelled as it was at first, where it was read back as a float since."""
    usage = body.get("usage") or {}
    if "cost_nano_usd" not in usage:
        return body
    return {**body, "usage": {**usage, "cost": exact(format_usd(usage["cost_nano_usd"]))}}


def not_found(response_id: str) -> ResponseNotFound:
    """What is said of a response that is not kept, whosever it is."""
    return ResponseNotFound(f"There is no kept response {response_id[:128]!r}; it was not stored, or it has expired.")


def page_of(items: list[Item], query: dict[str, str]) -> dict[str, Any]:
    """A page of a list: `order` asc or desc, `limit` 1 to 100, `after` an id. Raises `InvalidRequest`."""
    order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
    if order not in ("asc", "desc"):
        raise InvalidRequest("`order` must be asc or desc.", param="order")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 4 and 1 <= int(limit) <= 100):
        raise InvalidRequest("`limit` must be a number from 1 to 100.", param="limit")
    ordered = items if order == "asc" else items[::-1]
    if after is not None:
        places = [at for at, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"`after` names no item of this list: {after[:128]!r}.", param="after")
        ordered = ordered[places[-1] + 1 :]  # clients may give items the same id
    page = ordered[: int(limit)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else ("", "")
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(ordered) > len(page)}
