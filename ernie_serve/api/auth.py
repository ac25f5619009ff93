"""Who may call what: every path needs a key, unless it is listed as public, and most need a scope of it.

Knows paths, the scopes they need and the header that carries a key. Asks the meter whose key it is, and knows nothing
of accounts or money. A path that stands in no list is there for nobody but admin keys.
"""

import hashlib

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ernie_serve.api.problems import error_response, unknown_url
from ernie_serve.billing import keys
from ernie_serve.billing.keys import Caller
from ernie_serve.billing.meter import Meter
from ernie_serve.errors import Forbidden, RequestError

PUBLIC_PATHS = frozenset({"/health", "/health/live", "/health/ready"})

NEEDS: dict[str, keys.Scope | None] = {
    "/v1/completions": "inference",
    "/v1/chat/completions": "inference",
    "/v1/responses": "inference",
    "/tokenize": "inference",
    "/detokenize": "inference",
    "/v1/models": None,
    "/version": None,
    "/openapi.json": None,
    "/v1/key": "read-usage",
    "/v1/generation": "read-usage",
    "/v1/organization/usage": "read-usage",
    "/v1/organization/costs": "read-usage",
    "/admin": "admin",
    "/metrics": "metrics",
}
"""The scope that a path, and all that lies below it, needs; `None` is any key but one with the scope metrics alone."""


class Auth:
    """Lets a request through if its key may do what it asks for, and leaves its `Caller` in the request's state.

    Every answer to somebody who is known says where their limits stand.
    """

    def __init__(self, app: ASGIApp, meter: Meter) -> None:
        self._app = app
        self._meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with a 401, a 403 or, while the keys cannot be read, a 503."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            caller = await self._meter.authenticate(bearer_key(scope))
        except RequestError as error:
            headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
            await error_response(error, headers)(scope, receive, send)
            return

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                limits = self._meter.rate_headers(caller)
                told = [(name.encode(), value.encode()) for name, value in limits.items()]
                message["headers"] = [*message.get("headers", ()), *told]
            await send(message)

        try:
            require_scope(caller, scope["method"], scope["path"])
        except RequestError as error:
            await error_response(error)(scope, receive, send_with_limits)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send_with_limits)


def require_scope(caller: Caller, method: str, path: str) -> None:
    """Raise `Forbidden` where the caller's key lacks the scope of a path, `UnknownUrl` for a path in no list."""
    line = listed(path)
    if line not in NEEDS and "admin" not in caller.scopes:
        raise unknown_url(method, path)
    needed = NEEDS.get(line)
    if needed is not None:
        caller.require(needed)
    elif caller.scopes == {"metrics"}:
        raise Forbidden("This key has the scope `metrics` alone: it reads /metrics and nothing else.")


def listed(path: str) -> str:
    """The longest of the listed paths that a path is, or lies below; empty where it lies below none."""
    lines = (each for each in (*NEEDS, *PUBLIC_PATHS) if path == each or path.startswith(f"{each}/"))
    return max(lines, key=len, default="")


def caller_of(request: Request) -> Caller:
    """Who calls. Every request that reaches a route which is not public has a caller."""
    caller: Caller = request.scope["state"]["caller"]
    return caller


def bearer_key(scope: Scope) -> str | None:
    """The key of an `Authorization: Bearer …` header."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return key.strip().decode("utf-8", "replace") if scheme.lower() == b"bearer" and key.strip() else None
    return None


def key_digest(scope: Scope) -> bytes:
    """A digest of the key that a request carries; empty where it carries none."""
    key = bearer_key(scope)
    return hashlib.sha256(key.encode()).digest() if key else b""
