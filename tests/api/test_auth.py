import asyncio
import re
from typing import Any, cast

import pytest
from starlette.responses import Response
from starlette.routing import Route

from ernie_serve.api.app import create_app
from ernie_serve.api.auth import NEEDS, PUBLIC_PATHS
from ernie_serve.billing.free import FreeMeter
from ernie_serve.billing.keys import SCOPES, Caller
from ernie_serve.billing.keys import Scope as KeyScope
from ernie_serve.errors import StoreUnavailable, Unauthorized

KEYS = ("sk-one", "sk-two")


def test_without_keys_everybody_may_call(call: Any) -> None:
    assert call("GET", "/v1/models").status_code == 200


@pytest.mark.parametrize("header", ["Bearer sk-one", "bearer sk-two", "Bearer  sk-one "])
def test_any_key_opens(call_with: Any, header: str) -> None:
    assert call_with(meter=FreeMeter(KEYS))("GET", "/v1/models", headers={"authorization": header}).status_code == 200


WRONG = [
    None,
    "",
    "Bearer",
    "Bearer ",
    "Bearer sk-on",
    "Bearer sk-onee",
    "Basic sk-one",
    "sk-one",
    "Bearer ' OR 1=1",
    "Bearer " + "a" * 10_000,
]


@pytest.mark.parametrize("header", WRONG)
def test_wrong_key_is_a_401(call_with: Any, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    response = call_with(meter=FreeMeter(KEYS))("GET", "/v1/models", headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["x-request-id"]
    assert "sk-on" not in response.text


PATHS = [
    "/",
    "/v1/models",
    "//v1/models",
    "/v1/..%2fhealth/live",
    "/healthz",
    "/health/x",
    "/HEALTH/LIVE",
    "/health/live/../../v1/models",
    "/v1/models/ernie",
    "/docs",
    "/openapi.json",
    "/v1/nothing",
    "/health/live/x",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
def test_every_path_that_is_not_listed_is_closed(call_with: Any, method: str, path: str) -> None:
    assert call_with(meter=FreeMeter(KEYS))(method, path).status_code == 401


class ScopedMeter(FreeMeter):
    """Knows one key for each scope, by its name, and one that has none."""

    async def authenticate(self, key: str | None) -> Caller:
        if key not in (*SCOPES, "none"):
            raise Unauthorized("No.")
        scopes = frozenset({cast("KeyScope", key)} if key != "none" else ())
        return Caller(account_id="a", project_id="p", key_id=key, scopes=scopes)


def variants(path: str) -> list[str]:
    """Spellings of a path that some servers take for the same, decoded as a server hands them on."""
    last = path.rindex("/")
    return [
        path,
        f"{path}/",
        f"{path}//",
        f"/{path}",
        f"{path[:last]}//{path[last + 1 :]}",
        f"{path[:last]}/./{path[last + 1 :]}",
        f"/x/..{path}",
        f"/health/live/..{path}",
        f"/health/live;{path}",
        path.upper(),
        path.title(),
        f"{path}/.",
        f"{path}\x00",
        f"{path};x",
        f"{path}?key=admin",
        path.replace("e", "%65"),
        f"http://test{path}",
    ]


async def status_of(app: Any, method: str, path: str, key: str | None) -> int:
    """The status of a request whose path no client has tidied up."""
    headers = [] if key is None else [(b"authorization", b"Bearer " + key.encode())]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
    statuses: list[int] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    return statuses[0]


def test_every_route_is_closed_but_the_listed(make_services: Any) -> None:
    app = create_app(make_services(meter=ScopedMeter()))
    paths = {re.sub(r"\{[^}]*\}", "ernie", route.path) for route in walk(app.routes)}
    assert len(paths) >= 12
    assert paths >= PUBLIC_PATHS

    async def walk_all() -> None:
        for path in sorted(paths - PUBLIC_PATHS):
            assert needs_of(path), f"{path} is in no list: say in `NEEDS` what scope it needs"
            for spelled in variants(path):
                for method in ("GET", "HEAD", "POST", "OPTIONS"):
                    for key in (None, "wrong", "none", *SCOPES):
                        status, asked = await status_of(app, method, spelled, key), (method, spelled, key)
                        needed = needs_of(spelled.rstrip("/"))
                        if key in (None, "wrong"):
                            assert status == 401, asked
                        elif key == "admin" or (needed and may(key, needed[0])):
                            assert status not in (401, 403), asked
                        else:
                            assert status == (403 if needed else 404), asked

    asyncio.run(walk_all())


def test_a_key_of_metrics_reads_these_and_nothing_else(make_services: Any, ask_app: Any) -> None:
    app = create_app(make_services(meter=ScopedMeter()))
    for key, path, status in (
        ("metrics", "/metrics", 200),
        ("metrics", "/version", 403),
        ("metrics", "/v1/models", 403),
        ("metrics", "/v1/key", 403),
        ("metrics", "/admin/keys", 403),
        ("metrics", "/nothing", 404),
        ("inference", "/metrics", 403),
        ("read-usage", "/metrics", 403),
        ("admin", "/metrics", 200),
    ):
        answer = ask_app(app, "GET", path, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == status, (key, path)


def may(key: str, needed: KeyScope | None) -> bool:
    """Whether the key of a scope may call what needs one, or needs none but is nothing for Prometheus."""
    return key == needed or (needed is None and key != "metrics")


def needs_of(path: str) -> list[KeyScope | None]:
    """The scopes of the lines of the table that a path lies under, the nearest first."""
    lines = sorted((each for each in NEEDS if f"{path}/".startswith(f"{each}/")), key=len, reverse=True)
    return [NEEDS[each] for each in lines]


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/health"])
def test_spellings_of_a_public_path_are_not_public(make_services: Any, path: str) -> None:
    app = create_app(make_services(meter=ScopedMeter()))
    for spelled in variants(path):
        status = asyncio.run(status_of(app, "GET", spelled, None))
        assert status == (200 if spelled.rstrip("/") == path else 401), spelled


def test_a_path_in_no_list_is_there_for_admin_keys_alone(make_services: Any, ask_app: Any) -> None:
    app = create_app(make_services(meter=ScopedMeter()))
    app.add_route("/v1/forgotten", lambda request: Response("open"))
    for key, status in (("inference", 404), ("read-usage", 404), ("none", 404), ("admin", 200)):
        headers = {"authorization": f"Bearer {key}"}
        assert ask_app(app, "GET", "/v1/forgotten", headers=headers).status_code == status


def test_a_websocket_is_closed(make_services: Any) -> None:
    app = create_app(make_services(meter=ScopedMeter()))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/health/live", "headers": [], "query_string": b"", "subprotocols": []}
    asyncio.run(app(scope, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_a_store_that_cannot_be_read_lets_nobody_in(call_with: Any) -> None:
    class Away(FreeMeter):
        async def authenticate(self, key: str | None) -> Caller:
            raise StoreUnavailable("The billing store cannot be used at the moment.", retry_after_seconds=5)

    response = call_with(meter=Away())("GET", "/v1/models", headers={"authorization": "Bearer sk"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.json()["error"]["code"] == "billing_unavailable"


def walk(routes: Any) -> list[Route]:
    found: list[Route] = []
    for route in routes:
        if isinstance(route, Route):
            found.append(route)
        elif hasattr(route, "original_router"):
            found += walk(route.original_router.routes)
    return found


@pytest.mark.parametrize("path", sorted(PUBLIC_PATHS))
def test_health_needs_no_key(call_with: Any, path: str) -> None:
    assert call_with(meter=FreeMeter(KEYS))("GET", path).status_code == 200
