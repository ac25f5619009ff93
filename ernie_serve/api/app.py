"""The application: every route, the layers around them, and one handler for what goes wrong.

Knows which files make the API. Knows nothing of how any of them works, and builds nothing below this room.
"""

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from ernie_serve.api import chat, completions, health, models
from ernie_serve.api.auth import Auth
from ernie_serve.api.envelope import Envelope
from ernie_serve.api.problems import handle_http_exception, handle_request_error
from ernie_serve.api.services import Limits, Services
from ernie_serve.errors import RequestError

__all__ = ["Limits", "Services", "create_app"]


def create_app(services: Services) -> FastAPI:
    """The ASGI application over an engine that may still be loading. It starts nothing and closes nothing."""
    app = FastAPI(
        title="ernie-serve",
        openapi_url=None,
        redirect_slashes=False,
        middleware=[Middleware(Envelope), Middleware(Auth, keys=services.api_keys)],
        exception_handlers={RequestError: handle_request_error, HTTPException: handle_http_exception},
    )
    for room in (completions, chat, models, health):
        app.include_router(room.router(services))
    return app
