import asyncio
import logging
import re
from typing import Any

import pytest

from ernie_serve.api.connection import ClientLeft
from ernie_serve.api.envelope import Envelope
from ernie_serve.billing.free import FreeMeter

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


LINE = re.compile(r"(\S+) ('.*'|\".*\") \((\S+)\): (\d+|no answer) after \d+\.\d ms(.*)")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/v1/completions?key=canary", 200), ("POST", "/v1/nothing", 404), ("PUT", "/v1/models", 405)],
)
def test_a_request_is_a_line_of_the_log_at_debug_by_which_its_id_is_found(
    call: Any, caplog: pytest.LogCaptureFixture, method: str, path: str, status: int
) -> None:
    body = {"model": "ernie", "prompt": "my canary prompt"}
    headers = {"x-request-id": "mine-1", "authorization": "Bearer canary"}
    with caplog.at_level(logging.DEBUG, "ernie_serve.api.envelope"):
        assert call(method, path, json=body, headers=headers).status_code == status
    (record,) = [each for each in caplog.records if each.name == "ernie_serve.api.envelope"]
    assert record.levelname == "DEBUG"
    found = LINE.fullmatch(record.getMessage())
    assert found
    assert found.groups() == (method, repr(path.partition("?")[0]), "mine-1", str(status), "")
    assert PRIVATE not in caplog.text


def test_a_request_that_is_let_in_nowhere_is_a_line_too(call_with: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "ernie_serve.api.envelope"):
        refused = call_with(meter=FreeMeter(("sk-a",)))("GET", "/v1/models")
        call_with(own_name="")("GET", "/v1/models", headers={"host": "evil.example"})
    lines = [LINE.fullmatch(each.getMessage()) for each in caplog.records if each.name == "ernie_serve.api.envelope"]
    assert [each and each[4] for each in lines] == ["401", "403"]
    assert refused.headers["x-request-id"] in caplog.text


def test_a_path_breaks_no_line_of_the_log_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ClientLeft

    with caplog.at_level(logging.DEBUG):
        run(app, "/a\nERROR forged\x1b[31m" + "x" * 9999)
    (record,) = [each for each in caplog.records if each.name == "ernie_serve.api.envelope"]
    found = LINE.fullmatch(record.getMessage())
    assert found
    assert (found[4], found[5]) == ("no answer", ", when its client left")
    assert len(found[2]) < 230
    assert "\\n" in found[2]


def test_at_other_levels_a_request_is_no_line(call: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert call("GET", "/v1/nothing").status_code == 404
    assert "ernie_serve.api.envelope" not in [each.name for each in caplog.records]


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
