import gc
from typing import Any

import orjson

from ernie_serve.api.logprobs import LEAST, chat_logprobs, completion_logprobs, prompt_logprobs
from ernie_serve.messages import TokenLogprobs

NEVER = float("-inf")


def told_in_chat(services: Any, placed: Any) -> Any:
    return orjson.loads(orjson.dumps(chat_logprobs(services.tokenizer, placed)))


def told_in_completion(services: Any, placed: Any) -> Any:
    return orjson.loads(orjson.dumps(completion_logprobs(services.tokenizer, placed)))


def test_impossible_is_a_number(services: Any) -> None:
    placed = [(0, TokenLogprobs(97, NEVER, [(97, NEVER), (98, -1.0)]))]
    (token,) = told_in_chat(services, placed)["content"]
    assert token["logprob"] == token["top_logprobs"][0]["logprob"] == LEAST
    told = told_in_completion(services, placed)
    assert told["token_logprobs"] == [LEAST]
    assert told["top_logprobs"] == [{"a": LEAST, "b": -1.0}]


def test_chosen_token_is_told_beside_likelier_ones(services: Any) -> None:
    placed = [(3, TokenLogprobs(97, -5.0, [(98, -0.1), (99, -0.2)]))]
    assert told_in_completion(services, placed) == {
        "tokens": ["a"],
        "token_logprobs": [-5.0],
        "top_logprobs": [{"a": -5.0, "b": -0.1, "c": -0.2}],
        "text_offset": [3],
    }
    (token,) = told_in_chat(services, placed)["content"]
    assert [each["token"] for each in token["top_logprobs"]] == ["b", "c"]


def test_parts_of_a_character_do_not_look_alike(services: Any) -> None:
    placed = [(0, TokenLogprobs(0xE4, -1.0, [(0xE4, -1.0), (0xE5, -2.0)]))]
    assert told_in_completion(services, placed)["top_logprobs"] == [{"bytes:\\xe4": -1.0, "bytes:\\xe5": -2.0}]
    (token,) = told_in_chat(services, placed)["content"]
    assert [each["bytes"] for each in token["top_logprobs"]] == [[0xE4], [0xE5]]


def test_no_tokens_are_empty_lists(services: Any) -> None:
    assert told_in_chat(services, []) == {"content": [], "refusal": None}
    assert told_in_completion(services, [])["tokens"] == []


def test_what_is_told_of_many_tokens_leaves_the_collector_little_to_look_through(services: Any) -> None:
    placed = [(at, TokenLogprobs(97, -1.0, [(97, -1.0), (98, -2.0)])) for at in range(1000)]
    tokens = [token for _, token in placed]
    for tell in (
        lambda: chat_logprobs(services.tokenizer, placed),
        lambda: completion_logprobs(services.tokenizer, placed),
        lambda: prompt_logprobs(services.tokenizer, tokens),
    ):
        gc.collect()
        before = len(gc.get_objects())
        told = tell()
        gc.collect()
        assert len(gc.get_objects()) - before < 100
        assert told
