"""Every error has OpenAI's shape, wherever it comes from."""

from typing import Any

import pytest

ERRORS = [
    ("GET", "/", {}, 404, "unknown_url"),
    ("GET", "/v1/nothing", {}, 404, "unknown_url"),
    ("POST", "/v1/embeddings", {"json": {}}, 404, "unknown_url"),
    ("GET", "/docs", {}, 404, "unknown_url"),
    ("GET", "/openapi.json", {}, 404, "unknown_url"),
    ("GET", "/v1/completions", {}, 405, "method_not_allowed"),
    ("DELETE", "/v1/models/ernie", {}, 405, "method_not_allowed"),
    ("OPTIONS", "/v1/chat/completions", {}, 405, "method_not_allowed"),
    ("GET", "/v1/models/gpt-4", {}, 404, "model_not_found"),
    ("POST", "/v1/completions", {"json": {"model": "gpt-4", "prompt": "a"}}, 404, "model_not_found"),
    ("POST", "/v1/completions", {"json": {"prompt": "a"}}, 400, None),
    ("POST", "/v1/completions", {"json": {"model": "ernie"}}, 400, None),
    ("POST", "/v1/completions", {"json": {"model": "ernie", "prompt": "a" * 256}}, 400, "context_length_exceeded"),
    ("POST", "/v1/completions", {"json": []}, 400, None),
    ("POST", "/v1/completions", {"content": b"{", "headers": {"content-type": "application/json"}}, 400, None),
    ("POST", "/v1/completions", {"content": b"{}"}, 415, "unsupported_media_type"),
    ("POST", "/v1/chat/completions", {"data": {"a": "b"}}, 415, "unsupported_media_type"),
]


@pytest.mark.parametrize(("method", "path", "request_", "status", "code"), ERRORS)
def test_every_error_has_openais_body(
    call: Any, method: str, path: str, request_: dict[str, Any], status: int, code: str | None
) -> None:
    response = call(method, path, **request_)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code
    assert response.headers["x-request-id"]
    assert response.headers["openai-processing-ms"].isdecimal()


def test_wrong_method_names_the_right_one(call: Any) -> None:
    response = call("GET", "/v1/completions")
    assert response.headers["allow"] == "POST"
    assert "POST" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/ernie", "/health/live", "/health/ready"])
def test_head_answers_like_get(call: Any, path: str) -> None:
    assert call("HEAD", path).status_code == call("GET", path).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models/", "/health/live/", "/v1/models/baidu/ernie/"])
def test_a_trailing_slash_is_no_other_path(call: Any, path: str) -> None:
    assert call("GET", path).status_code == 200


def test_engine_that_loads_is_a_503_that_says_how_far(complete: Any, engine: Any) -> None:
    engine.state, engine.progress = "loading", (0.42, "reading weights")
    response = complete()
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_unavailable")
    assert "42%" in error["message"]
    assert "reading weights" in error["message"]


@pytest.mark.parametrize("state", ["failed", "closed"])
def test_engine_that_ended_is_a_503_without_its_reasons(chat: Any, engine: Any, state: str) -> None:
    engine.state, engine.failure = state, "CUDA error at /secret/path"
    response = chat()
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert "secret" not in response.text
