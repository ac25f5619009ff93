import json

import pytest

from ernie_serve.api.problems import error_body, error_response
from ernie_serve.errors import ContextLengthExceeded, EngineUnavailable, InvalidRequest, RequestError, RequestTimeout


def test_body_is_openais() -> None:
    assert json.loads(error_body(ContextLengthExceeded('too "long" 🎉', param="prompt"))) == {
        "error": {
            "message": 'too "long" 🎉',
            "type": "invalid_request_error",
            "param": "prompt",
            "code": "context_length_exceeded",
        }
    }


def every(kind: type[RequestError]) -> list[type[RequestError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in every(child))]


@pytest.mark.parametrize("kind", every(RequestError), ids=lambda kind: kind.__name__)
def test_every_error_is_answered_with_its_status(kind: type[RequestError]) -> None:
    response = error_response(kind("Told."))
    assert response.status_code == kind.status
    error = json.loads(bytes(response.body))["error"]
    assert error == {"message": "Told.", "type": kind.type, "param": None, "code": kind.code}


def test_unavailable_always_says_when_to_come_back() -> None:
    assert error_response(EngineUnavailable("x")).headers["retry-after"] == "5"
    assert error_response(EngineUnavailable("x", retry_after_seconds=30)).headers["retry-after"] == "30"
    assert "retry-after" not in error_response(InvalidRequest("x")).headers


def test_connection_with_half_a_body_is_not_used_again() -> None:
    assert error_response(RequestTimeout("x")).headers["connection"] == "close"
