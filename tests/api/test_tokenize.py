"""What a prompt costs is what the engine would be given."""

from typing import Any

import pytest

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_text_is_told_in_vllms_shape(call: Any) -> None:
    body = call("POST", "/tokenize", json={"model": "ernie", "prompt": "ab"}).json()
    assert body == {"count": 2, "max_model_len": 256, "tokens": [97, 98], "token_strs": None}
    assert call("POST", "/tokenize", json={"prompt": "a", "return_token_strs": True}).json()["token_strs"] == ["a"]
    assert call("POST", "/tokenize", json={"prompt": "", "add_special_tokens": True}).json()["tokens"] == []


@pytest.mark.parametrize(
    "fields", [{}, {"add_generation_prompt": False}, {"continue_final_message": True}, {"reasoning_effort": "low"}]
)
def test_conversation_counts_as_much_as_the_engine_reads(
    call: Any, chat: Any, engine: Any, fields: dict[str, Any]
) -> None:
    counted = call("POST", "/tokenize", json={"messages": MESSAGES, **fields}).json()
    assert chat(**fields).json()["usage"]["prompt_tokens"] == counted["count"] == len(counted["tokens"])
    assert engine.requests[0].prompt_token_ids == counted["tokens"]


def test_ids_and_text_are_inverse(call: Any) -> None:
    text = "é🎉 a"
    tokens = call("POST", "/tokenize", json={"prompt": text}).json()["tokens"]
    assert call("POST", "/detokenize", json={"tokens": tokens}).json() == {"prompt": text}
    assert call("POST", "/detokenize", json={"tokens": [257]}).json() == {"prompt": "<think>"}
    assert call("POST", "/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_no_engine_is_asked(call: Any, engine: Any) -> None:
    engine.state = "loading"
    assert call("POST", "/tokenize", json={"prompt": "a"}).status_code == 200
    assert call("POST", "/detokenize", json={"tokens": [97]}).status_code == 200
    assert engine.requests == []


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"prompt": 1}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "x"}, 404, "model"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [999]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "model": "x"}, 404, "model"),
    ],
)
def test_what_is_wrong_is_named(call: Any, path: str, body: Any, status: int, param: str) -> None:
    response = call("POST", path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_version(call: Any) -> None:
    assert call("GET", "/version").json()["version"].count(".") == 2
    assert call("HEAD", "/version/").status_code == 200
