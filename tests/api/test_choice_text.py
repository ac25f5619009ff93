"""However the outputs are cut, the text and its log-probabilities are the same."""

import random
from itertools import pairwise
from typing import Any, cast

import pytest

from ernie_serve.api.choice_text import ChoiceText, TextOptions
from ernie_serve.messages import EngineOutput, FinishReason, TokenLogprobs
from ernie_serve.text.tokenizer import Tokenizer

EOS = 256


@pytest.fixture
def tokenizer(services: Any) -> Tokenizer:
    return cast("Tokenizer", services.tokenizer)


def outputs(ids: list[int], cuts: list[int], reason: FinishReason, stop: int | None = None) -> list[EngineOutput]:
    """The ids cut at these places, the last output with the reason."""
    edges = [0, *sorted(cuts), len(ids)]
    pieces = [ids[start:end] for start, end in pairwise(edges)]
    return [
        EngineOutput(
            request_id="r",
            token_ids=piece,
            logprobs=[TokenLogprobs(token_id, -1.0, []) for token_id in piece],
            finish_reason=reason if number == len(pieces) - 1 else None,
            stop_token_id=stop if number == len(pieces) - 1 else None,
        )
        for number, piece in enumerate(pieces)
    ]


def read(text: ChoiceText, pushed: list[EngineOutput]) -> tuple[list[str], list[tuple[int, int]]]:
    """What is shown, push by push, until the text stops."""
    shown: list[str] = []
    tokens: list[tuple[int, int]] = []
    for output in pushed:
        piece, placed = text.push(output)
        shown.append(piece)
        tokens += [(place, entry.token_id) for place, entry in placed]
        assert all(place <= len("".join(shown)) for place, _ in tokens)
        if text.stopped:
            break
    return shown, tokens


TEXTS = ["Hello, world!", "你好，世界 🎉 end", "STOP", "no S no ST no STO", "aSTOPb", "xxSTxSTOSTOPyy", "🎉STOP🎉", ""]


@pytest.mark.parametrize("source", TEXTS)
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("logprobs", [False, True])
def test_cutting_elsewhere_changes_nothing(tokenizer: Tokenizer, source: str, include: bool, logprobs: bool) -> None:
    ids = list(source.encode())
    options = TextOptions(stops=("STOP", "世界"), include_stop=include, logprobs=logprobs)
    at = min([source.find(stop) for stop in options.stops if stop in source] or [len(source)])
    length = at + (len(next(s for s in options.stops if source[at:].startswith(s))) if at < len(source) else 0)
    expected = source[: length if include else at]
    chance = random.Random(0)
    whole: list[tuple[int, int]] | None = None
    for _ in range(20):
        cuts = chance.sample(range(len(ids)), k=min(len(ids), chance.randrange(8)))
        shown, tokens = read(ChoiceText(tokenizer, [1], options), outputs(ids, cuts, "length"))
        assert "".join(shown) == expected
        assert all("�" not in piece for piece in shown)
        whole = tokens if whole is None else whole
        if logprobs:
            assert tokens == whole
            assert [token_id for _, token_id in tokens] == list(expected.encode())


def test_character_of_several_tokens_is_shown_whole_and_its_tokens_with_it(tokenizer: Tokenizer) -> None:
    text = ChoiceText(tokenizer, [1], TextOptions(logprobs=True))
    ids = list("a🎉b".encode())
    seen = [text.push(output) for output in outputs(ids, [1, 2, 3, 4, 5], "length")]
    assert [shown for shown, _ in seen] == ["a", "", "", "", "🎉", "b"]
    assert [[place for place, _ in placed] for _, placed in seen] == [[0], [], [], [], [1, 1, 1, 1], [2]]


def test_unfinished_character_at_the_end_is_not_lost(tokenizer: Tokenizer) -> None:
    shown, _ = read(ChoiceText(tokenizer, [1], TextOptions()), outputs(list("a🎉".encode())[:-1], [2], "length"))
    assert "".join(shown) == "a�"


def test_held_back_text_is_not_lost_at_the_end(tokenizer: Tokenizer) -> None:
    text = ChoiceText(tokenizer, [1], TextOptions(stops=("STOP",), logprobs=True))
    shown, tokens = read(text, outputs(list(b"ab STO"), [3, 5], "length"))
    assert "".join(shown) == "ab STO"
    assert len(tokens) == 6
    assert not text.stopped


def test_stop_token_is_no_part_of_the_text(tokenizer: Tokenizer) -> None:
    for logprobs in (False, True):
        options = TextOptions(skip_special_tokens=False, logprobs=logprobs)
        shown, tokens = read(ChoiceText(tokenizer, [1], options), outputs([*b"ab", EOS], [1], "stop", stop=EOS))
        assert "".join(shown) == "ab"
        assert [token_id for _, token_id in tokens] == (list(b"ab") if logprobs else [])


def test_stop_token_is_shown_where_stops_are_included(tokenizer: Tokenizer) -> None:
    options = TextOptions(include_stop=True, skip_special_tokens=False)
    shown, _ = read(ChoiceText(tokenizer, [1], options), outputs([*b"ab", EOS], [], "stop", stop=EOS))
    assert "".join(shown) == "ab</s>"


def test_special_tokens_are_hidden_or_shown(tokenizer: Tokenizer) -> None:
    for skip, expected in ((True, "ab"), (False, "a<think>b")):
        options = TextOptions(skip_special_tokens=skip)
        shown, _ = read(ChoiceText(tokenizer, [1], options), outputs([ord("a"), 257, ord("b")], [1], "length"))
        assert "".join(shown) == expected


def test_stop_strings_are_looked_for_behind_the_least_length(tokenizer: Tokenizer) -> None:
    ids = list(b"abSTOPcdSTOPef")
    for least, expected in ((0, "ab"), (2, "ab"), (3, "abSTOPcd"), (8, "abSTOPcd"), (9, "abSTOPcdSTOPef")):
        options = TextOptions(stops=("STOP",), min_tokens=least)
        for cuts in ([], [3, 7], list(range(1, 14))):
            shown, _ = read(ChoiceText(tokenizer, [1], options), outputs(ids, cuts, "length"))
            assert "".join(shown) == expected
