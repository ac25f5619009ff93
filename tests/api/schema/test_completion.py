from typing import Any

import pytest

from ernie_serve.api.schema.completion import CompletionRequest, read_prompts
from ernie_serve.errors import InvalidRequest

VOCAB = 10


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [0, 9]], [[1, 2], [0, 9]]),
        ("a\0b", ["a\0b"]),
        (["a"] * 4, ["a"] * 4),
    ],
)
def test_prompt_has_four_shapes(prompt: Any, expected: Any) -> None:
    assert read_prompts(prompt, VOCAB, 4) == expected


WRONG: list[Any] = [
    None,
    1,
    True,
    {},
    "",
    [],
    [""],
    ["a", ""],
    [[]],
    [[1], []],
    ["a", 1],
    ["a", [1]],
    [[1], "a"],
    [1, "a"],
    [1, [2]],
    [1.0],
    [True],
    [None],
    [{}],
    [[1, "a"]],
    [[1, True]],
    [[[1]]],
    [10],
    [-1],
    [[1], [10]],
    [2**70],
    ["a"] * 5,
]


@pytest.mark.parametrize("prompt", WRONG, ids=[repr(each)[:20] for each in WRONG])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="`prompt`") as raised:
        read_prompts(prompt, VOCAB, 4)
    assert raised.value.param == "prompt"


def test_id_outside_the_vocabulary_is_told_with_the_range() -> None:
    with pytest.raises(InvalidRequest, match="token id 10; this model's ids run from 0 to 9"):
        read_prompts([1, 10], VOCAB, 4)


def test_best_of_is_at_least_n_and_no_stream() -> None:
    for best_of, n in ((1, None), (3, 3), (5, 2)):
        fields = CompletionRequest(model="m", prompt="p", best_of=best_of, n=n)
        fields.require_supported()
        assert fields.num_made == best_of
    with pytest.raises(InvalidRequest, match="`best_of` is 1, but `n` asks for 2"):
        CompletionRequest(model="m", prompt="p", best_of=1, n=2).require_supported()
    with pytest.raises(InvalidRequest, match="`best_of` cannot be streamed"):
        CompletionRequest(model="m", prompt="p", best_of=2, stream=True).require_supported()
    CompletionRequest(model="m", prompt="p", best_of=2, n=2, stream=True).require_supported()


def test_repeated_prompt_is_scored_like_the_answer() -> None:
    assert CompletionRequest(model="m", prompt="p", echo=True).scored_prompt is None
    assert CompletionRequest(model="m", prompt="p", logprobs=1).scored_prompt is None
    assert CompletionRequest(model="m", prompt="p", echo=True, logprobs=0).scored_prompt == 0
    assert CompletionRequest(model="m", prompt="p", prompt_logprobs=3).scored_prompt == 3


def test_scored_prompt_is_no_stream_unless_repeated() -> None:
    CompletionRequest(model="m", prompt="p", echo=True, logprobs=1, stream=True).require_supported()
    with pytest.raises(InvalidRequest, match="`prompt_logprobs` cannot be streamed"):
        CompletionRequest(model="m", prompt="p", prompt_logprobs=1, stream=True).require_supported()
