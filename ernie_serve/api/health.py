"""GET /health/live and /health/ready: whether the server runs, and whether it answers requests yet.

/health is the latter, as other servers spell it. Knows the engine's state. Needs no key, and so tells nothing that only
the operator should read.
"""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from ernie_serve.api.services import Services
from ernie_serve.api.whole import JsonAnswer


def router(services: Services) -> APIRouter:
    """The endpoint's routes."""
    routes = APIRouter()

    @routes.api_route("/health/live", methods=["GET", "HEAD"])
    async def live(request: Request) -> JsonAnswer:
        return JsonAnswer({"status": "ok"})

    @routes.api_route("/health", methods=["GET", "HEAD"])
    @routes.api_route("/health/ready", methods=["GET", "HEAD"])
    async def ready(request: Request) -> JsonAnswer:
        state = services.engine.state
        told: dict[str, Any] = {"state": state}
        headers = {"cache-control": "no-store"}
        if state == "loading":
            share, what = services.engine.progress
            told |= {"progress": round(share, 4), "doing": what}
            headers["retry-after"] = "1"
        status = 200 if state == "ready" else 503
        return JsonAnswer(told, status_code=status, headers=headers)

    return routes
