"""GET /v1/models and /v1/models/{id}: what is served here, under every name it answers to.

Knows names and the length of the context.
"""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from ernie_serve.api.services import Services
from ernie_serve.api.whole import JsonAnswer


def router(services: Services) -> APIRouter:
    """The endpoint's routes. An id may contain slashes."""
    routes = APIRouter()

    @routes.api_route("/v1/models", methods=["GET", "HEAD"])
    async def list_models(request: Request) -> JsonAnswer:
        models = [model_object(services, name) for name in services.model_names]
        return JsonAnswer({"object": "list", "data": models})

    @routes.api_route("/v1/models/{model_id:path}", methods=["GET", "HEAD"])
    async def retrieve_model(request: Request) -> JsonAnswer:
        model_id = request.path_params["model_id"]
        services.require_model(model_id)
        return JsonAnswer(model_object(services, model_id))

    return routes


def model_object(services: Services, name: str) -> dict[str, Any]:
    """OpenAI's model object, with the length of the context beside it."""
    return {
        "id": name,
        "object": "model",
        "created": services.created,
        "owned_by": "ernie-serve",
        "max_model_len": services.context_length,
    }
