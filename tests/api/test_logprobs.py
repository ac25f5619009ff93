from typing import Any

from ernie_serve.api.logprobs import LEAST, chat_logprobs, completion_logprobs
from ernie_serve.messages import TokenLogprobs

NEVER = float("-inf")


def test_impossible_is_a_number(services: Any) -> None:
    placed = [(0, TokenLogprobs(97, NEVER, [(97, NEVER), (98, -1.0)]))]
    (token,) = chat_logprobs(services.tokenizer, placed)["content"]
    assert token["logprob"] == token["top_logprobs"][0]["logprob"] == LEAST
    told = completion_logprobs(services.tokenizer, placed)
    assert told["token_logprobs"] == [LEAST]
    assert told["top_logprobs"] == [{"a": LEAST, "b": -1.0}]


def test_chosen_token_is_told_beside_likelier_ones(services: Any) -> None:
    placed = [(3, TokenLogprobs(97, -5.0, [(98, -0.1), (99, -0.2)]))]
    assert completion_logprobs(services.tokenizer, placed) == {
        "tokens": ["a"],
        "token_logprobs": [-5.0],
        "top_logprobs": [{"a": -5.0, "b": -0.1, "c": -0.2}],
        "text_offset": [3],
    }
    (token,) = chat_logprobs(services.tokenizer, placed)["content"]
    assert [each["token"] for each in token["top_logprobs"]] == ["b", "c"]


def test_parts_of_a_character_do_not_look_alike(services: Any) -> None:
    placed = [(0, TokenLogprobs(0xE4, -1.0, [(0xE4, -1.0), (0xE5, -2.0)]))]
    assert completion_logprobs(services.tokenizer, placed)["top_logprobs"] == [
        {"bytes:\\xe4": -1.0, "bytes:\\xe5": -2.0}
    ]
    (token,) = chat_logprobs(services.tokenizer, placed)["content"]
    assert [each["bytes"] for each in token["top_logprobs"]] == [[0xE4], [0xE5]]


def test_no_tokens_are_empty_lists(services: Any) -> None:
    assert chat_logprobs(services.tokenizer, []) == {"content": [], "refusal": None}
    assert completion_logprobs(services.tokenizer, [])["tokens"] == []
