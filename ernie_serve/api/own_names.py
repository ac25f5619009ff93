"""Which names a server has that asks for no key: none that a web page can have too.

A page whose name is made to point at this machine is of one origin with the server then: its browser asks nobody
whether it may call, and lets it read the answers (DNS rebinding). Knows the header `Host`. Knows no key and no route.
"""

import ipaddress
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from ernie_serve.api.problems import error_response
from ernie_serve.errors import HostNotServed

OF_THE_HOST = frozenset(
    {"host.docker.internal", "gateway.docker.internal", "host.containers.internal", "host.lima.internal"}
)
"""What containers call the machine that they run on."""


class OwnNames:
    """Answers requests to an address, to a name of this machine or to none, and refuses those to any other name.

    `name` is the one that the server was told to listen on, if it was one.
    """

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._names = OF_THE_HOST | {name.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with a 403."""
        if scope["type"] == "http":
            for header, value in scope["headers"]:
                if header == b"host" and not is_own(host := value.decode("latin-1"), self._names):
                    await error_response(refusal(host))(scope, receive, send)
                    return
        await self._app(scope, receive, send)


def is_own(host: str, names: Collection[str] = OF_THE_HOST) -> bool:
    """Whether the value of a `Host` header is an address, `localhost` or a name below it, one of `names`, or empty.

    The port is not looked at.
    """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    name = name.lower().removesuffix(".")
    if not host or name.rpartition(".")[2] == "localhost" or name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def refusal(host: str) -> HostNotServed:
    """What who asks by another name is told, which may be a proxy that passes on its own."""
    return HostNotServed(
        f"This server asks for no key, so it answers to localhost and to addresses alone, not to {host[:100]!r}: any "
        "web page could give its own name this machine's address. Call it by its address; or start it with --api-key "
        "or --billing, or with --allow-unauthenticated if whoever reaches it may use it."
    )
