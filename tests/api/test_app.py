"""Every error has OpenAI's shape, wherever it comes from."""

from typing import Any

import pytest

from ernie_serve.billing.free import FreeMeter
from ernie_serve.errors import EngineUnavailable

ERRORS = [
    ("GET", "/", {}, 404, "unknown_url"),
    ("GET", "/v1/nothing", {}, 404, "unknown_url"),
    ("POST", "/v1/embeddings", {"json": {}}, 404, "unknown_url"),
    ("GET", "/docs", {}, 404, "unknown_url"),
    ("GET", "/v1/completions", {}, 405, "method_not_allowed"),
    ("DELETE", "/v1/models/ernie", {}, 405, "method_not_allowed"),
    ("GET", "/v1/responses/input_tokens", {}, 405, "method_not_allowed"),
    ("DELETE", "/v1/responses/input_tokens", {}, 405, "method_not_allowed"),
    ("OPTIONS", "/v1/nothing", {}, 404, "unknown_url"),
    ("HEAD", "/v1/nothing", {}, 404, "unknown_url"),
    ("HEAD", "/v1/chat/completions", {}, 405, "method_not_allowed"),
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
    if method == "HEAD":
        return
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code
    assert response.headers["x-request-id"]
    assert response.headers["openai-processing-ms"].isdecimal()


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "lives under /v1, and this is /v1/chat/completions;"),
        ("/models", "this is /v1/models;"),
        ("/ping", "lives under /v1;"),
        ("/ping", "/health and /metrics"),
        ("/v1/embeddings", "/openapi.json lists"),
        ("/tokenizer_info", "/openapi.json lists"),
        ("/admin/users", "/openapi.json lists"),
    ],
)
def test_unknown_url_says_what_helps(call: Any, path: str, hint: str) -> None:
    assert hint in call("POST", path, json={}).json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/admin", "/admin/users"])
def test_who_cannot_have_forgotten_v1_is_not_sent_there(call: Any, path: str) -> None:
    assert "under /v1" not in call("GET", path).json()["error"]["message"]


def test_what_is_no_id_of_a_response_is_not_taken_for_one(call: Any) -> None:
    response = call("POST", "/v1/responses/compact", json={"model": "ernie", "input": "Hi"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")
    assert "/v1/responses/compact is not offered" in response.json()["error"]["message"]


def test_wrong_method_names_the_right_one(call: Any) -> None:
    response = call("GET", "/v1/completions")
    assert response.headers["allow"] == "POST"
    assert "POST" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/ernie", "/health/live", "/health/ready", "/health"])
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


def test_engine_that_dies_at_work_is_a_503_without_its_reasons(chat: Any, engine: Any) -> None:
    engine.break_after, engine.breakage = 3, EngineUnavailable("The engine has ended. CUDA error at /secret/path")
    engine.state_when_broken = "failed"
    response = chat()
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert "secret" not in response.text
    assert "log" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "methods"),
    [("/v1/chat/completions", {"POST", "OPTIONS"}), ("/v1/models/", {"GET", "HEAD", "OPTIONS"})],
)
def test_options_tell_the_methods(call: Any, path: str, methods: set[str]) -> None:
    response = call("OPTIONS", path)
    assert response.status_code == 204
    assert set(response.headers["allow"].split(", ")) == methods
    assert response.content == b""


PREFLIGHT = {
    "origin": "https://a.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def test_pages_of_other_origins_may_not_call_unless_allowed(call: Any) -> None:
    assert "access-control-allow-origin" not in call("OPTIONS", "/v1/completions", headers=PREFLIGHT).headers
    assert "access-control-allow-origin" not in call("GET", "/v1/models", headers=PREFLIGHT).headers


@pytest.mark.parametrize("origins", [("https://a.example",), ("*",)])
def test_pages_of_allowed_origins_may_call(call_with: Any, origins: tuple[str, ...]) -> None:
    call = call_with(allowed_origins=origins, meter=FreeMeter(("sk-right",)))
    response = call("OPTIONS", "/v1/completions", headers=PREFLIGHT)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == origins[0]
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "authorization" in response.headers["access-control-allow-headers"]
    refused = call("GET", "/v1/models", headers={"origin": "https://a.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == origins[0]
    assert "x-request-id" in refused.headers["access-control-expose-headers"]


def test_pages_of_origins_that_are_not_allowed_may_not_call(call_with: Any) -> None:
    call = call_with(allowed_origins=("https://b.example",))
    assert "access-control-allow-origin" not in call("OPTIONS", "/v1/completions", headers=PREFLIGHT).headers
    assert "access-control-allow-origin" not in call("GET", "/v1/models", headers=PREFLIGHT).headers
