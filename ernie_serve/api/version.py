"""GET /version: which release answers.

Knows the installed package's number.
"""

from importlib.metadata import version

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.services import Services


def router(services: Services) -> APIRouter:
    """The endpoint's route."""
    routes = APIRouter()
    body = orjson.dumps({"version": version("ernie-serve")})

    @routes.api_route("/version", methods=["GET", "HEAD"])
    async def show_version(request: Request) -> Response:
        return Response(body, media_type="application/json")

    return routes
