from typing import Any

import pytest
from starlette.routing import Route

from ernie_serve.api.app import create_app
from ernie_serve.api.auth import PUBLIC_PATHS
from ernie_serve.billing.free import FreeMeter

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
    "/health",
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


def test_every_route_is_closed_but_the_listed(call_with: Any, make_services: Any) -> None:
    call = call_with(meter=FreeMeter(KEYS))
    paths = {route.path for route in walk(create_app(make_services()).routes)}
    assert len(paths) >= 6
    assert paths >= PUBLIC_PATHS
    for path in paths:
        status = call("GET", path.replace("{model_id:path}", "ernie")).status_code
        assert (status != 401) == (path in PUBLIC_PATHS), path


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
