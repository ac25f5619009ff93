"""The invented tokenizer behaves as the family's: any text survives, and special tokens are single ids."""

import json
import random
from functools import cache

import pytest
from tokenizers import Tokenizer

from ernie_serve.model.random_tokenizer import MIN_VOCAB_SIZE, SPECIAL, TAGS, random_tokenizer

SIZES = [MIN_VOCAB_SIZE, 640, 1024, 103424]


@cache
def tokenizer(size: int) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(random_tokenizer(size)))


@pytest.mark.parametrize("size", SIZES)
def test_every_id_up_to_the_padding_is_one_piece(size: int) -> None:
    vocab = random_tokenizer(size)["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert len(vocab) <= size
    assert tokenizer(size).get_vocab() == vocab


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "text", ["Hello, who are you?", " leading and  double", "你好，世界", "é\t\n\x00🙂", "User: 12,5\nAssistant: ", ""]
)
def test_text_comes_back_unchanged(size: int, text: str) -> None:
    assert tokenizer(size).decode(tokenizer(size).encode(text).ids) == text


def test_any_text_comes_back_unchanged() -> None:
    chance = random.Random(1)
    for _ in range(200):
        text = "".join(
            chr(chance.choice([chance.randrange(32, 127), chance.randrange(160, 0xD000)])) for _ in range(30)
        )
        assert tokenizer(640).decode(tokenizer(640).encode(text).ids) == text


def test_nothing_is_added_around_a_text() -> None:
    assert tokenizer(640).encode("User", add_special_tokens=True).tokens == ["User"]


def test_a_trailing_space_is_a_token_of_its_own() -> None:
    assert tokenizer(640).encode("Assistant: ").tokens == ["Assistant", ":", "▁"]


@pytest.mark.parametrize("token", SPECIAL + TAGS)
def test_a_control_token_is_one_id(token: str) -> None:
    assert tokenizer(640).encode(token).tokens == [token]


def test_special_tokens_vanish_from_text_and_tags_do_not() -> None:
    ids = tokenizer(640).encode("".join(SPECIAL + TAGS)).ids
    assert tokenizer(640).decode(ids, skip_special_tokens=True) == "".join(TAGS)


def test_ids_are_the_published_ones_where_these_are_known() -> None:
    vocab = tokenizer(103424).get_vocab()
    assert [vocab[token] for token in ("<unk>", "<s>", "</s>", "0", "9", "<0x00>", "<0x0A>", "<0xFF>")] == [
        0,
        1,
        2,
        3,
        12,
        13,
        23,
        268,
    ]
    assert (vocab["<|end_of_sentence|>"], vocab["<|begin_of_sentence|>"]) == (100272, 100273)
