"""Who may call: anybody with one of the keys the server was started with.

Denies by default: only the paths listed here are public. Knows nothing of accounts or money.
"""

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from ernie_serve.api.problems import error_response
from ernie_serve.errors import Unauthorized

PUBLIC_PATHS = frozenset({"/health/live", "/health/ready"})


class Auth:
    """Lets a request through if it carries a known key, or if no keys were set."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with a 401."""
        if scope["type"] == "http" and self._digests and scope["path"] not in PUBLIC_PATHS:
            key = bearer_key(scope)
            if key is None or not self._knows(key):
                what = "No API key was given" if key is None else "The API key is not known"
                error = Unauthorized(f"{what}. Send one of this server's keys as `Authorization: Bearer KEY`.")
                await error_response(error, {"www-authenticate": "Bearer"})(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _knows(self, key: bytes) -> bool:
        """Whether the key is one of ours; takes as long for a near miss as for a far one."""
        given = digest(key)
        return sum(hmac.compare_digest(given, known) for known in self._digests) > 0


def bearer_key(scope: Scope) -> bytes | None:
    """The key of an `Authorization: Bearer …` header."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" and key.strip() else None
    return None


def digest(key: bytes) -> bytes:
    """A digest of fixed length, so that keys are compared without their lengths."""
    return hashlib.sha256(key).digest()
