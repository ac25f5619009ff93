import asyncio
import logging
from typing import Any

import pytest

from ernie_serve.api.envelope import Envelope

PRIVATE = "canary"


@pytest.mark.parametrize("given", ["abc", "req_1.2:3-4", "a" * 128])
def test_plain_request_id_is_kept(call: Any, given: str) -> None:
    assert call("GET", "/health/live", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", "<script>", "a\tb", "ü".encode()])
def test_other_request_ids_are_replaced(call: Any, given: Any) -> None:
    made = call("GET", "/health/live", headers={"x-request-id": given}).headers["x-request-id"]
    assert made.startswith("req_")
    assert made != call("GET", "/health/live").headers["x-request-id"]


def test_failure_of_ours_is_a_json_500_and_its_log_quotes_nobody(
    complete: Any, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine.break_after, engine.breakage = 0, ValueError("cannot digest 'my canary prompt'")
    response = complete(prompt="my canary prompt")
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", None)
    assert PRIVATE not in response.text
    assert PRIVATE not in caplog.text
    assert "ValueError" in caplog.text
    assert "in generate" in caplog.text
    assert response.headers["x-request-id"] in caplog.text


def test_failure_after_the_answer_began_is_not_answered_twice(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError(PRIVATE)

    sent = run(app, "/x")
    assert [message["type"] for message in sent] == ["http.response.start"]
    assert "RuntimeError" in caplog.text
    assert PRIVATE not in caplog.text


def test_what_is_no_http_passes_through() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    asyncio.run(Envelope(app, lambda path, status: None)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]  # neither is used
    assert seen == [{"type": "lifespan"}]


def test_causes_are_logged_by_type(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            raise KeyError(PRIVATE)
        except KeyError as error:
            raise RuntimeError(PRIVATE) from error

    with caplog.at_level(logging.ERROR):
        assert run(app, "/x")[0]["status"] == 500
    assert "RuntimeError" in caplog.text
    assert "KeyError" in caplog.text
    assert PRIVATE not in caplog.text


def run(app: Any, path: str) -> list[Any]:
    """What the envelope around an application sends."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": []}
    asyncio.run(Envelope(app, lambda path, status: None)(scope, None, send))  # type: ignore[arg-type]  # nothing is received
    return sent
