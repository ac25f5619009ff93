from typing import Any

import pytest

from ernie_serve.api.schema.completion import CompletionRequest
from ernie_serve.api.schema.fields import read_logit_bias, read_stop_token_ids, read_stops
from ernie_serve.api.schema.validation import validated
from ernie_serve.errors import InvalidRequest

INT64 = 2**63

RANGES: list[tuple[str, list[Any], list[Any]]] = [
    ("n", [1], [0, -1]),
    ("max_tokens", [0], [-1]),
    ("min_tokens", [0], [-1]),
    ("temperature", [0, 2, 0.1], [-0.01, 2.01]),
    ("top_p", [0, 1], [-0.01, 1.01]),
    ("top_k", [-1, 0, 1, 2**31 - 1], [-2, 2**31]),
    ("min_p", [0, 1], [-0.01, 1.01]),
    ("repetition_penalty", [0.01, 10], [0, -1, 10.01]),
    ("presence_penalty", [-2, 2], [-2.01, 2.01]),
    ("frequency_penalty", [-2, 2], [-2.01, 2.01]),
    ("seed", [-INT64, INT64 - 1], [-INT64 - 1, INT64, 2.0**70]),
    ("priority", [-(2**31) + 1, 2**31 - 1], [-(2**31), 2**31]),
    ("best_of", [1], [0]),
    ("logprobs", [0, 5], [-1, 6]),
]


@pytest.mark.parametrize(("name", "good", "bad"), RANGES, ids=[name for name, _, _ in RANGES])
def test_number_is_taken_to_its_limits_and_refused_beyond(name: str, good: list[Any], bad: list[Any]) -> None:
    base = {"model": "m", "prompt": "p"}
    for value in good:
        assert getattr(validated(CompletionRequest, {**base, name: value}), name) == value
    for value in bad:
        with pytest.raises(InvalidRequest, match=f"`{name}` must be") as raised:
            validated(CompletionRequest, {**base, name: value})
        assert raised.value.param == name


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (None, ()),
        ([], ()),
        ("a", ("a",)),
        (list("abcdefghijklmnop"), tuple("abcdefghijklmnop")),
        ("x" * 256, ("x" * 256,)),
    ],
)
def test_stop_is_a_string_or_up_to_sixteen(stop: Any, expected: tuple[str, ...]) -> None:
    assert read_stops(stop) == expected


@pytest.mark.parametrize("stop", [["a"] * 17, "", [""], "x" * 257, ["a", 1], [None], 7, {"a": 1}, [["a"]]])
def test_other_stops_are_refused(stop: Any) -> None:
    with pytest.raises(InvalidRequest, match="`stop`") as raised:
        read_stops(stop)
    assert raised.value.param == "stop"


def test_stop_token_ids_are_within_the_vocabulary() -> None:
    assert read_stop_token_ids(None, 10) == ()
    assert read_stop_token_ids([0, 9], 10) == (0, 9)
    assert len(read_stop_token_ids([1] * 128, 10)) == 128
    for wrong in ([10], [-1], [1.0], ["1"], [True], 1, [1] * 129, {"1": 1}):
        with pytest.raises(InvalidRequest, match="`stop_token_ids`"):
            read_stop_token_ids(wrong, 10)


def test_logit_bias_maps_ids_to_bounded_numbers() -> None:
    assert read_logit_bias(None, 10) == read_logit_bias({}, 10) == {}
    assert read_logit_bias({"0": -100, "9": 100, "5": 0.5}, 10) == {0: -100.0, 9: 100.0, 5: 0.5}
    assert len(read_logit_bias({str(i): 1 for i in range(1024)}, 5000)) == 1024


WRONG_BIAS: list[Any] = [
    {"10": 1},
    {"-1": 1},
    {"a": 1},
    {"1.0": 1},
    {"": 1},
    {"²": 1},
    {"٣": 1},
    {"9" * 5000: 1},
    {"1": 100.1},
    {"1": -100.1},
    {"1": "5"},
    {"1": None},
    {"1": True},
    {"1": float("nan")},
    {"1": float("inf")},
    {str(i): 1 for i in range(1025)},
    [1],
    [],
    "1",
    0,
]


@pytest.mark.parametrize("bias", WRONG_BIAS, ids=range(len(WRONG_BIAS)))
def test_other_biases_are_refused(bias: Any) -> None:
    with pytest.raises(InvalidRequest, match="`logit_bias`") as raised:
        read_logit_bias(bias, 10)
    assert raised.value.param == "logit_bias"
    assert len(raised.value.message) < 200


def test_usage_in_a_stream_is_asked_for() -> None:
    def wants(**fields: Any) -> bool:
        return validated(CompletionRequest, {"model": "m", "prompt": "p", **fields}).wants_usage

    assert not wants()
    assert not wants(stream=True)
    assert not wants(stream=True, stream_options={})
    assert not wants(stream=True, stream_options={"include_usage": False, "include_obfuscation": False})
    assert wants(stream=True, stream_options={"include_usage": True})
    with pytest.raises(InvalidRequest, match="only for streams"):
        wants(stream_options={"include_usage": True})
    with pytest.raises(InvalidRequest, match=r"`stream_options.include_obfuscation` is not supported"):
        wants(stream=True, stream_options={"include_obfuscation": True})
    with pytest.raises(InvalidRequest, match=r"`stream_options.continuous_usage_stats` needs `include_usage`"):
        wants(stream=True, stream_options={"continuous_usage_stats": True})
