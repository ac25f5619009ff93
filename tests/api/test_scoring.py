"""Repeated and scored prompts, as evaluation harnesses ask for them, and answers ranked by their likelihood."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from ernie_serve.api.completion_format import CompletionFormat
from ernie_serve.messages import TokenLogprobs


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_harness_scores_a_prompt(complete: Any, engine: Any, max_tokens: int) -> None:
    body = complete(prompt="Hié", echo=True, logprobs=1, max_tokens=max_tokens).json()
    (choice,) = body["choices"]
    told = choice["logprobs"]
    answer = "H"[:max_tokens]
    assert choice["text"] == "Hié" + answer
    assert told["tokens"] == ["H", "i", "bytes:\\xc3", "bytes:\\xa9", *answer]
    assert told["token_logprobs"] == [None, -0.5, -0.5, -0.5, *[-0.5] * max_tokens]
    assert told["top_logprobs"][0] is None
    assert told["top_logprobs"][1] == {"i": -0.5}
    assert told["text_offset"] == [0, 1, 2, 2, *[3] * max_tokens]
    assert body["usage"]["completion_tokens"] == max_tokens
    assert body["usage"]["prompt_tokens"] == 4
    assert choice["finish_reason"] == "length"
    assert engine.running == set()


def test_harness_finds_a_token_behind_the_prompt_even_where_the_answer_ends_at_once(complete: Any, engine: Any) -> None:
    engine.reply = ""
    (choice,) = complete(prompt="Hi", echo=True, logprobs=1, max_tokens=1).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "stop")
    assert choice["logprobs"]["tokens"] == ["H", "i", "</s>"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


@pytest.mark.parametrize("options", [{}, {"skip_special_tokens": False}, {"truncate_prompt_tokens": 3}])
@pytest.mark.parametrize("prompt", ["a</s>bé", [97, 256, 98]])
@pytest.mark.parametrize("stream", [False, True])
def test_tokens_stand_where_the_text_has_them(
    complete: Any, read_events: Any, prompt: Any, options: dict[str, Any], stream: bool
) -> None:
    response = complete(prompt=prompt, echo=True, logprobs=0, max_tokens=1, stream=stream, **options)
    chunks = read_events(response.text)[:-1] if stream else [response.json()]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["text"] for choice in choices)
    told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    tokens, places = ([value for each in told for value in each[name]] for name in ("tokens", "text_offset"))
    assert len(tokens) == len(places) > 2
    for token, place in zip(tokens, places, strict=True):
        is_shown = not token.startswith("bytes:") and (token != "</s>" or "</s>" in text)
        assert text[place:].startswith(token) or not is_shown


def test_batch_is_scored_prompt_by_prompt(complete: Any) -> None:
    choices = complete(prompt=["ab", "cd"], echo=True, logprobs=1, max_tokens=0, n=2).json()["choices"]
    assert [choice["text"] for choice in choices] == ["ab", "ab", "cd", "cd"]
    assert [choice["logprobs"]["tokens"] for choice in choices] == [["a", "b"]] * 2 + [["c", "d"]] * 2


@pytest.mark.parametrize("max_tokens", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_once_and_told_with_each_of_its_choices(
    complete: Any, engine: Any, read_events: Any, stream: bool, max_tokens: int
) -> None:
    response = complete(prompt=["ab", "cd"], echo=True, logprobs=1, max_tokens=max_tokens, n=3, stream=stream)
    asked = [request for request in engine.requests if request.sampling.prompt_logprobs is not None]
    assert [bytes(request.prompt_token_ids) for request in asked] == [b"ab", b"cd"]
    assert len(engine.requests) == (2 if max_tokens == 0 else 6)
    if stream:
        parts = [chunk["choices"][0] for chunk in read_events(response.text)[:-1]]
        for index in range(6):
            mine = [part for part in parts if part["index"] == index]
            assert "".join(part["text"] for part in mine) == ["ab", "cd"][index // 3] + "He"[:max_tokens]
            assert mine[0]["logprobs"]["tokens"][:2] == list(["ab", "cd"][index // 3])
    else:
        for choice in response.json()["choices"]:
            prompt = ["ab", "cd"][choice["index"] // 3]
            assert choice["logprobs"]["tokens"] == [*prompt, *"He"[:max_tokens]]
            assert choice["text"] == prompt + "He"[:max_tokens]


def test_an_answer_with_many_scores_is_spelled_beside_the_event_loop(
    complete: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    whole = CompletionFormat.whole

    def noted(self: CompletionFormat, answers: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return whole(self, answers)

    monkeypatch.setattr(CompletionFormat, "whole", noted)
    monkeypatch.setattr("ernie_serve.api.answer.INLINE_SCORES", 5)
    for max_tokens in (5, 6):
        assert len(complete(logprobs=1, max_tokens=max_tokens).json()["choices"][0]["logprobs"]["tokens"]) == max_tokens
    assert threads == [True, False]


def test_stream_scores_alike(complete: Any, read_events: Any) -> None:
    fields = {"prompt": "Hi", "echo": True, "logprobs": 2, "max_tokens": 3}
    whole = complete(**fields).json()["choices"][0]
    parts = [chunk["choices"][0] for chunk in read_events(complete(**fields, stream=True).text)[:-1]]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for part in parts if part["logprobs"] for value in part["logprobs"][name]] == values


def test_prompt_that_is_scored_and_not_repeated(complete: Any, chat: Any) -> None:
    choice = complete(prompt="Hi", prompt_logprobs=2).json()["choices"][0]
    assert choice["text"] == "Hello, world!"
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second["105"] == {"logprob": -0.5, "rank": 1, "decoded_token": "i"}
    assert second["106"] == {"logprob": -1.5, "rank": 2, "decoded_token": "j"}
    told = chat(prompt_logprobs=0).json()["prompt_logprobs"]
    assert len(told) == len("user: Hi\nassistant: ")
    assert chat(prompt_logprobs=0, stream=True).status_code == 400


def test_token_ids_are_returned(complete: Any, chat: Any, read_events: Any) -> None:
    choice = complete(prompt="Hi", return_token_ids=True).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([72, 105], [*b"Hello, world!", 256])
    chunks = read_events(complete(prompt="Hi", return_token_ids=True, stream=True).text)[:-1]
    parts = [chunk["choices"][0] for chunk in chunks]
    assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
    assert [part.get("prompt_token_ids") for part in parts] == [[72, 105]] + [None] * (len(parts) - 1)
    body = chat(return_token_ids=True).json()
    assert bytes(body["prompt_token_ids"]) == b"user: Hi\nassistant: "
    assert body["choices"][0]["token_ids"] == choice["token_ids"]
    chunks = read_events(chat(return_token_ids=True, stream=True).text)[:-1]
    assert chunks[0]["prompt_token_ids"] == body["prompt_token_ids"]
    assert [i for c in chunks for each in c["choices"] for i in each.get("token_ids", [])] == choice["token_ids"]


@pytest.mark.parametrize(("limit", "read"), [(3, "xyz"), (1, "z"), (100, "abcxyz")])
def test_prompt_is_cut_from_its_beginning(complete: Any, engine: Any, limit: int, read: str) -> None:
    body = complete(prompt="abcxyz", truncate_prompt_tokens=limit, echo=True, max_tokens=0).json()
    assert body["choices"][0]["text"] == read
    assert body["usage"]["prompt_tokens"] == len(read)


def test_prompt_is_cut_to_the_room_there_is(complete: Any, engine: Any) -> None:
    assert complete(prompt="x" * 300, truncate_prompt_tokens=-1, max_tokens=50).status_code == 200
    assert len(engine.requests[0].prompt_token_ids) == 206
    assert complete(prompt="x", truncate_prompt_tokens=0).json()["error"]["param"] == "truncate_prompt_tokens"
    assert complete(prompt="x", truncate_prompt_tokens=-2).json()["error"]["param"] == "truncate_prompt_tokens"


@pytest.fixture
def graded(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Let the choices of a prompt say their seed, and be as likely as told."""

    def grade(logprobs: dict[int, float]) -> None:
        def outputs(request: Any) -> Any:
            seed = request.sampling.seed
            engine.reply = str(seed)
            yield from (
                type(output)(
                    **{
                        **{name: getattr(output, name) for name in output.__struct_fields__},
                        "logprobs": [TokenLogprobs(i, logprobs[seed], []) for i in output.token_ids],
                    }
                )
                for output in list(plain(request))
            )

        plain = engine._outputs
        monkeypatch.setattr(engine, "_outputs", outputs)

    return grade


def test_best_answers_are_kept_and_all_are_billed(complete: Any, engine: Any, graded: Any) -> None:
    graded({0: -3.0, 1: -1.0, 2: -2.0})
    body = complete(seed=0, best_of=3, n=2, return_token_ids=True).json()
    assert [choice["text"] for choice in body["choices"]] == ["1", "2"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == 6
    body = complete(seed=0, best_of=3, prompt=["a", "b"], return_token_ids=True).json()
    assert [choice["text"] for choice in body["choices"]] == ["1", "1"]
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [[97], [98]]


def test_constraints_reach_the_engine(complete: Any, engine: Any) -> None:
    complete(allowed_token_ids=[72, 256, 72], bad_words=["ab", " c"])
    sampling = engine.requests[0].sampling
    assert sampling.allowed_token_ids == (72, 256)
    assert sampling.bad_words == (tuple(b"ab"), tuple(b" ab"), tuple(b" c"))
    for fields in ({"allowed_token_ids": []}, {"allowed_token_ids": [999]}, {"bad_words": [""]}, {"bad_words": "a"}):
        (name,) = fields
        assert complete(**fields).json()["error"]["param"] == name
