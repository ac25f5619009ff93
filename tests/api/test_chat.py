from typing import Any

import pytest


def test_answer_has_openais_shape(chat: Any) -> None:
    body = chat().json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    prompt = len("user: Hi\nassistant: ")
    assert body == {
        "object": "chat.completion",
        "model": "baidu/ernie",
        "system_fingerprint": "fp_ernie_serve",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello, world!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": 14,
            "total_tokens": prompt + 14,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_template_sees_roles_and_plain_contents(chat: Any, engine: Any) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "S"}]},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "b"},
    ]
    chat(messages=messages)
    chat(messages=messages, add_generation_prompt=False)
    prompts = [bytes(request.prompt_token_ids).decode() for request in engine.requests]
    assert prompts == [
        "system: S\nuser: a\nassistant: \nuser: b\nassistant: ",
        "system: S\nuser: a\nassistant: \nuser: b\n",
    ]


def test_stream_begins_with_the_role_and_ends_with_the_reason(chat: Any, read_events: Any) -> None:
    *chunks, done = read_events(chat(stream=True).text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert [choice["delta"].keys() for choice in choices[1:-1]] == [{"content"}] * 13
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hello, world!"


def test_every_choice_of_a_stream_has_its_role_and_reason(chat: Any, engine: Any, read_events: Any) -> None:
    engine.reply = ""
    chunks = read_events(chat(stream=True, n=3).text)[:-1]
    for index in range(3):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [choice["delta"].get("role") for choice in choices] == ["assistant", None]
        assert choices[-1]["finish_reason"] == "stop"


def test_usage_comes_last_and_is_null_before(chat: Any, read_events: Any) -> None:
    *chunks, last, done = read_events(chat(stream=True, stream_options={"include_usage": True}).text)
    assert done == "[DONE]"
    assert (last["choices"], last["usage"]) == ([], chat().json()["usage"])
    assert all(chunk["usage"] is None for chunk in chunks)


def test_each_chunk_tells_the_usage_so_far(chat: Any, read_events: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = read_events(chat(stream=True, stream_options=options).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, last["usage"]["completion_tokens"])
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {last["usage"]["prompt_tokens"]}
    assert last["usage"] == chat().json()["usage"]


def test_each_chunk_tells_the_reasoning_so_far(think: Any, engine: Any, read_events: Any) -> None:
    engine.reply = "One.\n</think>\n\nTwo."
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = read_events(think(stream=True, stream_options=options).text)
    counts = [chunk["usage"]["completion_tokens_details"]["reasoning_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1] == last["usage"]["completion_tokens_details"]["reasoning_tokens"]


def test_logprobs_tell_bytes(chat: Any, engine: Any) -> None:
    engine.reply = "aé"
    logprobs = chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    first, second, third = logprobs["content"]
    assert first == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.5, "bytes": [97]},
            {"token": "b", "logprob": -1.5, "bytes": [98]},
        ],
    }
    assert bytes(second["bytes"] + third["bytes"]).decode() == "é"
    assert chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize(("count", "status"), [(0, 200), (20, 200), (21, 400), (-1, 400)])
def test_top_logprobs_have_limits(chat: Any, count: int, status: int) -> None:
    response = chat(logprobs=True, top_logprobs=count)
    assert response.status_code == status
    if status == 200:
        assert len(response.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == count


def test_answer_is_as_long_as_fits_unless_said_otherwise(call_with: Any, engine: Any) -> None:
    call = call_with(max_output_tokens=50)
    engine.reply = "x" * 1000

    def ask(text: str, **fields: Any) -> Any:
        messages = [{"role": "user", "content": text}]
        return call("POST", "/v1/chat/completions", json={"model": "ernie", "messages": messages, **fields}).json()

    assert ask("a")["usage"]["completion_tokens"] == 50
    assert ask("a" * 220)["usage"]["completion_tokens"] == 256 - 220 - len("user: \nassistant: ")
    assert ask("a", max_tokens=7)["usage"]["completion_tokens"] == 7
    assert ask("a", max_completion_tokens=8)["usage"]["completion_tokens"] == 8
    error = ask("a", max_completion_tokens=51)["error"]
    assert (error["param"], error["code"]) == ("max_completion_tokens", None)
    error = ask("a" * 300)["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_checkpoint_without_a_template_points_to_completions(call_with: Any) -> None:
    body = {"model": "ernie", "messages": [{"role": "user", "content": "Hi"}]}
    response = call_with(template=None)("POST", "/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]


REFUSED = [
    ("functions", [{"name": "f"}]),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("chat_template", "{{ 1 }}"),
    ("chat_template_kwargs", {"tokenize": True}),
    ("echo", True),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_is_not_implemented_is_refused_by_name(chat: Any, name: str, value: Any) -> None:
    response = chat(**{name: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name


def test_values_that_ask_for_nothing_are_accepted(chat: Any) -> None:
    fields = {
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "metadata": {"a": "b"},
        "store": False,
        "user": "u",
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prediction": None,
        "logit_bias": None,
        "stop": None,
    }
    assert chat(**fields).json()["choices"][0]["message"]["content"] == "Hello, world!"
