"""GET /health/live and /health/ready: whether the server runs, and whether it answers requests yet.

/health is the latter, as other servers spell it. A server whose engine is stuck, so that only starting it again helps,
is neither. Knows the engine's state, and how long it has said nothing. Needs no key, and so tells nothing that only
the operator should read.
"""

from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.services import Services


def router(services: Services) -> APIRouter:
    """The endpoint's routes."""
    routes = APIRouter()

    def is_stuck() -> bool:
        return services.engine.silent_seconds > services.limits.silent_seconds

    @routes.api_route("/health/live", methods=["GET", "HEAD"])
    async def live(request: Request) -> Response:
        stuck = is_stuck()
        told = {"status": "stuck" if stuck else "ok"}
        return Response(orjson.dumps(told), status_code=503 if stuck else 200, media_type="application/json")

    @routes.api_route("/health", methods=["GET", "HEAD"])
    @routes.api_route("/health/ready", methods=["GET", "HEAD"])
    async def ready(request: Request) -> Response:
        state = "stuck" if is_stuck() else services.engine.state
        told: dict[str, Any] = {"state": state}
        headers = {"cache-control": "no-store"}
        if state == "loading":
            share, what = services.engine.progress
            told |= {"progress": round(share, 4), "doing": what}
            headers["retry-after"] = "1"
        status = 200 if state == "ready" else 503
        return Response(orjson.dumps(told), status_code=status, headers=headers, media_type="application/json")

    return routes
