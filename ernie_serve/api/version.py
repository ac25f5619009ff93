"""GET /version: which release answers.

Knows the installed package's number.
"""

from importlib.metadata import version

from fastapi import APIRouter
from starlette.requests import Request

from ernie_serve.api.services import Services
from ernie_serve.api.whole import JsonAnswer


def router(services: Services) -> APIRouter:
    """The endpoint's route."""
    routes = APIRouter()
    told = {"version": version("ernie-serve")}

    @routes.api_route("/version", methods=["GET", "HEAD"])
    async def show_version(request: Request) -> JsonAnswer:
        return JsonAnswer(told)

    return routes
