from typing import Any

import pytest

from ernie_serve.errors import EngineUnavailable


def texts(response: Any) -> list[str]:
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


def test_answer_has_openais_shape(complete: Any) -> None:
    body = complete().json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "baidu/ernie",
        "system_fingerprint": "fp_ernie_serve",
        "choices": [{"index": 0, "text": "Hello, world!", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 14,
            "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_sixteen_tokens_unless_said_otherwise(complete: Any, engine: Any) -> None:
    engine.reply = "x" * 100
    body = complete().json()
    assert body["choices"][0] == {"index": 0, "text": "x" * 16, "logprobs": None, "finish_reason": "length"}
    assert texts(complete(max_tokens=20)) == ["x" * 20]


def test_prompts_are_strings_or_ids_alone_or_in_batches(complete: Any, engine: Any) -> None:
    engine.replies = {b"ab": "one", b"cd": "two"}
    assert texts(complete(prompt="ab")) == ["one"]
    assert texts(complete(prompt=[97, 98])) == ["one"]
    assert texts(complete(prompt=["ab", "cd"])) == ["one", "two"]
    assert texts(complete(prompt=[[99, 100], [97, 98]])) == ["two", "one"]
    assert texts(complete(prompt=["cd", "ab"], n=2)) == ["two", "two", "one", "one"]


def test_large_prompt_takes_the_same_way(call_with: Any, engine: Any) -> None:
    call = call_with(max_model_len=10_000)
    response = call("POST", "/v1/completions", json={"model": "ernie", "prompt": "x" * 9000})
    assert response.json()["usage"]["prompt_tokens"] == 9000
    response = call("POST", "/v1/completions", json={"model": "ernie", "prompt": "x" * 10_000})
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("prompt", ["Hi", ["Hi"], [72, 105], [[72, 105]]])
def test_echo_puts_the_prompt_first(complete: Any, read_events: Any, prompt: Any) -> None:
    assert texts(complete(prompt=prompt, echo=True)) == ["HiHello, world!"]
    chunks = read_events(complete(prompt=prompt, echo=True, stream=True).text)[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "HiHello, world!"


def test_echo_of_special_tokens_follows_their_switch(complete: Any) -> None:
    assert texts(complete(prompt=[257, 72], echo=True, max_tokens=0)) == ["H"]
    assert texts(complete(prompt=[257, 72], echo=True, max_tokens=0, skip_special_tokens=False)) == ["<think>H"]


def test_nothing_wanted_is_nothing_made(complete: Any, engine: Any) -> None:
    body = complete(max_tokens=0).json()
    assert body["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    assert body["usage"]["completion_tokens"] == 0
    assert engine.requests == []


def test_n_choices_have_seeds_of_their_own(complete: Any, engine: Any) -> None:
    assert texts(complete(n=3, seed=7)) == ["Hello, world!"] * 3
    assert sorted(request.sampling.seed for request in engine.requests) == [7, 8, 9]


@pytest.mark.parametrize(("n", "status"), [(128, 200), (129, 400)])
def test_n_has_a_limit(complete: Any, n: int, status: int) -> None:
    response = complete(n=n)
    assert response.status_code == status
    assert status == 200 or response.json()["error"]["param"] == "n"


def test_choices_of_a_batch_have_a_limit(complete: Any) -> None:
    assert len(texts(complete(prompt=["a"] * 32, n=8, max_tokens=1))) == 256
    assert complete(prompt=["a"] * 33, n=8, max_tokens=1).json()["error"]["param"] == "n"
    assert complete(prompt=["a"] * 257, max_tokens=1).json()["error"]["param"] == "prompt"


def test_logprobs_tell_tokens_places_and_alternatives(complete: Any, engine: Any) -> None:
    engine.reply = "aé"
    logprobs = complete(logprobs=1).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"a": -0.5}, {"bytes:\\xc3": -0.5}, {"bytes:\\xa9": -0.5}],
        "text_offset": [0, 1, 1],
    }
    assert len(complete(logprobs=5).json()["choices"][0]["logprobs"]["top_logprobs"][0]) == 5
    assert complete(logprobs=0).json()["choices"][0]["logprobs"]["top_logprobs"][0] == {"a": -0.5}


def test_stream_adds_up_to_the_answer(complete: Any, engine: Any, read_events: Any) -> None:
    engine.reply = "one 🎉 two STOP three"
    fields = {"max_tokens": 100, "stop": "STOP", "logprobs": 2, "n": 2}
    whole = complete(**fields).json()["choices"]
    *chunks, done = read_events(complete(stream=True, **fields).text)
    assert done == "[DONE]"
    for index in (0, 1):
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == whole[index]["text"] == "one 🎉 two "
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]
        for name, values in whole[index]["logprobs"].items():
            assert [value for part in parts if part["logprobs"] for value in part["logprobs"][name]] == values
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_last_and_is_null_before(complete: Any, read_events: Any) -> None:
    *chunks, last, done = read_events(complete(stream=True, stream_options={"include_usage": True}).text)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == complete().json()["usage"]
    assert chunks
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)


def test_each_chunk_tells_the_usage_so_far(complete: Any, read_events: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = read_events(complete(stream=True, stream_options=options).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, last["usage"]["completion_tokens"])
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {last["usage"]["prompt_tokens"]}
    assert last["usage"] == complete().json()["usage"]


@pytest.mark.parametrize("stop", ["STOP", ["x", "STOP"], ["OP", "STOP"], ["STOP", "def"]])
@pytest.mark.parametrize("step", [1, 2, 5, 50])
def test_stop_string_is_found_across_tokens(complete: Any, engine: Any, stop: Any, step: int) -> None:
    engine.reply, engine.step = "abcST STOP def", step
    body = complete(stop=stop, max_tokens=50).json()
    assert body["choices"][0]["text"] == "abcST "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert texts(complete(stop=stop, max_tokens=50, include_stop_str_in_output=True)) == ["abcST STOP"]


def test_ignore_eos_runs_to_the_end(complete: Any) -> None:
    body = complete(ignore_eos=True, max_tokens=20).json()
    assert body["choices"][0]["text"] == "Hello, world!Hello,"
    assert body["choices"][0]["finish_reason"] == "length"


def test_stop_token_ids_end_the_text(complete: Any) -> None:
    assert texts(complete(stop_token_ids=[ord("o")])) == ["Hell"]
    assert texts(complete(stop_token_ids=[ord("o")], include_stop_str_in_output=True)) == ["Hello"]
    assert texts(complete(stop_token_ids=[ord("o")], min_tokens=5)) == ["Hello, w"]


def test_priority_and_salt_reach_the_engine(complete: Any, engine: Any) -> None:
    complete(priority=-3, cache_salt="mine")
    assert (engine.requests[0].priority, engine.requests[0].cache_salt) == (-3, "mine")


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/responses", {"input": "Hi"}),
    ],
)
def test_where_requests_are_served_as_they_come_none_goes_first(
    call_with: Any, engine: Any, path: str, asked: dict[str, Any]
) -> None:
    call = call_with(takes_priority=False)
    for priority in (-1, 1):
        refused = call("POST", path, json={"model": "ernie", "priority": priority, **asked})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
        assert "--scheduling-policy priority" in refused.json()["error"]["message"]
    assert engine.requests == []
    for nothing in (0, None):
        assert call("POST", path, json={"model": "ernie", "priority": nothing, **asked}).status_code == 200


def test_prompt_that_does_not_fit_is_told_with_both_numbers(complete: Any) -> None:
    assert complete(prompt="x" * 255).status_code == 200
    error = complete(prompt="x" * 256).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert error["message"].count("256") == 2


def test_engine_that_fails_is_a_500_or_an_error_event(complete: Any, engine: Any, read_events: Any) -> None:
    engine.break_after = 3
    response = complete()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_failure"
    response = complete(stream=True)
    *chunks, last = read_events(response.text)
    assert response.status_code == 200
    assert len(chunks) == 3
    assert last == {"error": {"message": "It broke.", "type": "server_error", "param": None, "code": "engine_failure"}}


def test_engine_that_fails_before_the_first_token_has_its_status_in_a_stream_too(complete: Any, engine: Any) -> None:
    engine.break_after = 0
    assert complete(stream=True).status_code == 500
    engine.breakage = EngineUnavailable("It ended.")
    assert complete(stream=True).status_code == 503


def test_refused_fields_are_named(complete: Any) -> None:
    for name, value in (("suffix", "x"), ("use_beam_search", True)):
        response = complete(**{name: value})
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)


def test_metadata_and_unknown_fields_change_nothing(complete: Any) -> None:
    extra = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "invented": 1}
    assert texts(complete(**extra)) == ["Hello, world!"]
