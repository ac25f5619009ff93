"""The application: every route, the layers around them, and one handler for what goes wrong.

Knows which files make the API. Knows nothing of how any of them works, and builds nothing below this room.
"""

from fastapi import Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from ernie_serve.api import (
    admin_accounts,
    admin_keys,
    admin_prices,
    chat,
    completions,
    description,
    health,
    metrics,
    models,
    organization,
    own_use,
    responses,
    tokenize,
    version,
)
from ernie_serve.api.auth import Auth
from ernie_serve.api.envelope import Envelope
from ernie_serve.api.own_names import OwnNames
from ernie_serve.api.problems import handle_http_exception, handle_request_error
from ernie_serve.api.services import Services
from ernie_serve.errors import RequestError

RATE_HEADERS = [
    f"x-ratelimit-{field}-{name}" for name in ("requests", "tokens") for field in ("limit", "remaining", "reset")
]


def create_app(services: Services) -> FastAPI:
    """The ASGI application over an engine that may still be loading. It starts nothing and closes nothing."""
    app = FastAPI(
        title="ernie-serve",
        openapi_url=None,
        redirect_slashes=False,
        middleware=[
            *cross_origin(services),
            Middleware(Envelope, answered=services.measures.answered),
            *([] if services.own_name is None else [Middleware(OwnNames, name=services.own_name)]),
            Middleware(Auth, meter=services.meter),
        ],
        exception_handlers={RequestError: handle_request_error, HTTPException: handle_http_exception},
    )
    speaking = (completions, chat, responses, models, tokenize, health, metrics, version, description)
    for room in speaking:
        app.include_router(room.router(services))
    for room in (own_use, organization, admin_keys, admin_accounts, admin_prices):
        app.include_router(room.router(services), dependencies=[Depends(services.require_metered)])
    return app


def cross_origin(services: Services) -> list[Middleware]:
    """Answers what browsers ask before a page of another origin may call; nothing, unless some origin is allowed."""
    if not services.allowed_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=services.allowed_origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=[
                "x-request-id",
                "openai-processing-ms",
                "retry-after",
                "idempotent-replayed",
                *RATE_HEADERS,
            ],
        )
    ]
