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


def test_best_of_must_be_n() -> None:
    CompletionRequest(model="m", prompt="p", best_of=1).require_supported()
    CompletionRequest(model="m", prompt="p", best_of=3, n=3).require_supported()
    for best_of, n in ((2, None), (3, 2), (1, 2)):
        with pytest.raises(InvalidRequest, match="`best_of` must equal `n`"):
            CompletionRequest(model="m", prompt="p", best_of=best_of, n=n).require_supported()


def test_echo_with_logprobs_is_refused_by_name() -> None:
    CompletionRequest(model="m", prompt="p", echo=True).require_supported()
    CompletionRequest(model="m", prompt="p", logprobs=1).require_supported()
    with pytest.raises(InvalidRequest, match="`echo` together with `logprobs`"):
        CompletionRequest(model="m", prompt="p", echo=True, logprobs=0).require_supported()
