"""GET /openapi.json: the API's own description.

Knows every path with the shapes it takes and gives. Knows nothing of how any of them is answered.
"""

from functools import cache
from importlib.metadata import version
from typing import Any, NamedTuple

import orjson
from fastapi import APIRouter
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request

from ernie_serve.api.schema import admin, answers, queries, records
from ernie_serve.api.schema.chat import ChatRequest
from ernie_serve.api.schema.completion import CompletionRequest
from ernie_serve.api.schema.response import ResponseRequest
from ernie_serve.api.schema.tokenize import DetokenizeRequest, TokenizeRequest
from ernie_serve.api.services import Services
from ernie_serve.api.whole import JsonAnswer


class Operation(NamedTuple):
    """One thing that can be asked."""

    method: str
    path: str
    summary: str
    answer: type[BaseModel] | None
    body: type[BaseModel] | None = None
    streams: bool = False
    query: type[queries.QueryFields] | None = None
    media: tuple[str, ...] = ("application/x-ndjson", "text/csv")  # where the answer is no JSON


OPERATIONS = (
    Operation("post", "/v1/completions", "Continue a text", answers.Completion, CompletionRequest, streams=True),
    Operation("post", "/v1/chat/completions", "Answer a chat", answers.ChatCompletion, ChatRequest, streams=True),
    Operation("post", "/v1/responses", "Answer with items", answers.ResponseObject, ResponseRequest, streams=True),
    Operation("post", "/v1/responses/input_tokens", "Count a response's input", answers.InputTokens, ResponseRequest),
    Operation("get", "/v1/responses/{response_id}", "A kept response", answers.ResponseObject),
    Operation("delete", "/v1/responses/{response_id}", "Forget a response", answers.DeletedResponse),
    Operation("get", "/v1/responses/{response_id}/input_items", "What a response was asked", answers.ItemList),
    Operation("get", "/v1/models", "What is served here", answers.ModelList),
    Operation("get", "/v1/models/{model_id}", "One model", answers.ModelObject),
    Operation("post", "/tokenize", "The ids of a prompt", answers.Tokenized, TokenizeRequest),
    Operation("post", "/detokenize", "The text of ids", answers.Detokenized, DetokenizeRequest),
    Operation("get", "/version", "The release that answers", answers.Version),
    Operation("get", "/v1/key", "What the key may spend and has spent", records.KeyStanding),
    Operation(
        "get", "/v1/generation", "What one request cost", records.GenerationAnswer, query=queries.GenerationQuery
    ),
    Operation(
        "get", "/v1/organization/usage/completions", "Tokens by time", records.BucketPage, query=queries.UsageQuery
    ),
    Operation("get", "/v1/organization/costs", "Money by time", records.BucketPage, query=queries.CostsQuery),
    Operation("get", "/v1/organization/usage/export", "Every request, a line each", None, query=queries.ExportQuery),
    Operation("get", "/admin/keys", "Keys", records.RecordList, query=queries.KeysQuery),
    Operation("post", "/admin/keys", "Make a key", records.NewKeyRecord, admin.NewKeyBody),
    Operation("get", "/admin/keys/{key_id}", "One key", records.KeyRecord),
    Operation("post", "/admin/keys/{key_id}", "Limit a key", records.KeyRecord, admin.KeyChangeBody),
    Operation("delete", "/admin/keys/{key_id}", "Disable a key", records.KeyRecord),
    Operation("get", "/admin/accounts", "Accounts", records.RecordList, query=queries.ListQuery),
    Operation("get", "/admin/accounts/{account_id}", "One account", records.AccountRecord),
    Operation(
        "post", "/admin/accounts/{account_id}", "Close or open it", records.AccountRecord, admin.AccountChangeBody
    ),
    Operation("post", "/admin/accounts/{account_id}/topups", "Add credit", records.AccountRecord, admin.TopUpBody),
    Operation("get", "/admin/bookings", "What was booked", records.RecordList, query=queries.BookingsQuery),
    Operation("get", "/admin/projects", "Projects", records.RecordList, query=queries.ProjectsQuery),
    Operation("post", "/admin/projects/{project_id}", "Limit it", records.ProjectRecord, admin.ProjectChangeBody),
    Operation("get", "/admin/prices", "Prices by version", records.RecordList, query=queries.NumberedQuery),
    Operation("get", "/metrics", "What is counted, for Prometheus", None, media=("text/plain",)),
    Operation("get", "/health/live", "Whether the server runs", answers.Health),
    Operation("get", "/health/ready", "Whether it answers requests", answers.Health),
    Operation("get", "/health", "The same, where other servers have it", answers.Health),
)

_REF = "#/components/schemas/{model}"


def router(services: Services) -> APIRouter:
    """The endpoint's route."""
    routes = APIRouter()

    @routes.api_route("/openapi.json", methods=["GET", "HEAD"])
    async def show_description(request: Request) -> JsonAnswer:
        return JsonAnswer(encoded())

    return routes


@cache
def encoded() -> bytes:
    """The description as JSON, made when it is first asked for."""
    return orjson.dumps(describe())


def describe() -> dict[str, Any]:
    """The description, in OpenAPI 3.1."""
    models = {model for each in OPERATIONS for model in (each.body, each.answer) if model} | {answers.ProblemAnswer}
    _, schemas = models_json_schema(
        [(model, "validation") for model in sorted(models, key=lambda model: model.__name__)], ref_template=_REF
    )
    paths: dict[str, Any] = {}
    for each in OPERATIONS:
        paths.setdefault(each.path, {})[each.method] = _described(each)
    return {
        "openapi": "3.1.0",
        "info": {"title": "ernie-serve", "version": version("ernie-serve")},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _described(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = _json(operation.answer) if operation.answer else {media: {} for media in operation.media}
    if operation.streams:
        content["text/event-stream"] = {}  # a schema here would be read as that of one event
    problem = {"description": "What went wrong", "content": _json(answers.ProblemAnswer)}
    told: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method}_{operation.path.strip('/').replace('/', '_')}",
        "responses": {"200": {"description": "The answer", "content": content}, "4XX": problem, "5XX": problem},
        "parameters": [
            {"name": name.strip("{}"), "in": "path", "required": True, "schema": {"type": "string"}}
            for name in operation.path.split("/")
            if name.startswith("{")
        ]
        + (_parameters(operation.query) if operation.query else []),
    }
    if operation.body is not None:
        told["requestBody"] = {"required": True, "content": _json(operation.body)}
    return told


def _parameters(query: type[queries.QueryFields]) -> list[dict[str, Any]]:
    """What may stand behind the question mark; lists are repeated."""
    schema = query.model_json_schema()
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": each}
        for name, each in schema["properties"].items()
    ]


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": _reference(model)}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}
