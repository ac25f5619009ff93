from typing import Any

import pytest


@pytest.mark.parametrize("state", ["loading", "ready", "failed", "closed"])
def test_live_whatever_the_engine_does(call: Any, engine: Any, state: str) -> None:
    engine.state = state
    assert call("GET", "/health/live").status_code == 200


@pytest.mark.parametrize("path", ["/health/ready", "/health"])
def test_ready_says_how_far_loading_is(call: Any, engine: Any, path: str) -> None:
    engine.state, engine.progress = "loading", (1 / 3, "reading weights")
    response = call("GET", path)
    assert response.status_code == 503
    assert response.json() == {"state": "loading", "progress": 0.3333, "doing": "reading weights"}
    assert response.headers["retry-after"] == "1"


def test_ready_when_the_engine_is(call: Any) -> None:
    response = call("GET", "/health/ready")
    assert (response.status_code, response.json()) == (200, {"state": "ready"})


@pytest.mark.parametrize("state", ["failed", "closed"])
def test_not_ready_when_the_engine_ended(call: Any, engine: Any, state: str) -> None:
    engine.state, engine.failure = state, "secret"
    response = call("GET", "/health/ready")
    assert (response.status_code, response.json()) == (503, {"state": state})
