"""An answer that is sent in one piece, once it is made.

Knows that a client may leave before. Knows nothing of choices or tokens.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ernie_serve.api.connection import while_connected


class JsonAnswer(Response):
    """An answer in JSON, from an object or as it is spelled already."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """The body."""
        return content if isinstance(content, bytes) else orjson.dumps(content)


class WholeAnswer(Response):
    """Makes an answer and sends it, unless the client leaves before; `client_left` is told then.

    It is sent by the task that made it: nothing has to wake up between its charge and its first byte.
    """

    media_type = "application/json"

    def __init__(self, make: Callable[[], Awaitable[Response]], client_left: Callable[[], None]) -> None:
        super().__init__()
        self._make = make
        self._client_left = client_left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises `ClientLeft`, and what making it raises, before anything is sent."""

        async def tell() -> None:
            made = await self._make()
            await made(scope, receive, send)

        await while_connected(receive, tell(), self._client_left)


def with_usage(body: bytes, usage: dict[str, Any]) -> bytes:
    """An object of JSON that is not empty, with its usage added as the last field."""
    return b'%b,"usage":%b}' % (body[:-1], orjson.dumps(usage))
