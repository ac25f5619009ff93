import json
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ernie_serve.errors import CheckpointError
from ernie_serve.text.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello, who are you?",
    "  two  spaces  and trailing ",
    "北京是中国的首都。\n龘 🙂👩‍👩‍👧",
    "<s>User: <|im_start|>x<|im_end|></s> <think>a</think>",
    "a\r\n\tb\x00c\ufeff",
]


@pytest.fixture(scope="session")
def reference(tokenizer_folder):
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_transformers_does_and_adds_nothing(tokenizer, reference, text):
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_decodes_as_transformers_does(tokenizer, reference, text, skip_special_tokens):
    ids = tokenizer.encode(text)
    expected = reference.decode(ids, skip_special_tokens=skip_special_tokens)
    assert tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) == expected


@settings(deadline=None, max_examples=80, derandomize=True)
@given(text=st.text(max_size=60))
def test_any_text_comes_back(tokenizer, text):
    """Except the metaspace sign, which a metaspace vocabulary reads as a space."""
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False), skip_special_tokens=False) == text.replace(
        "▁", tokenizer.decode(tokenizer.encode("▁"))
    )


@settings(deadline=None, max_examples=80, derandomize=True)
@given(text=st.lists(st.sampled_from(["<s>", "<|im_end|>", "<think>", "<mask:1>", "<", "|>", "a ", "你"])).map("".join))
def test_control_spellings_are_text_where_they_are_not_to_be_parsed(tokenizer, text):
    ids = tokenizer.encode(text, parse_special=False)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


def test_control_spellings_read_as_text_are_tokenised_as_if_the_tokens_did_not_exist(tokenizer_folder, tokenizer):
    description = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    description["added_tokens"] = []
    innocent = Tokenizer(description)
    for text in ["a <|im_end|> b", "<think>hm</think>", "<|im_start|><mask:1>"]:
        assert tokenizer.encode(text, parse_special=False) == innocent.encode(text)


def test_leading_spaces_survive_decoding(tokenizer):
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"


def test_a_decoder_that_strips_is_overruled(tokenizer_folder, tokenizer):
    description = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    description["decoder"] = {"type": "Sequence", "decoders": [description["decoder"], strip]}
    assert Tokenizer(description).decode(tokenizer.encode(" a")) == " a"


def test_bytes_of_the_tokens_make_the_text(tokenizer):
    text = "é 北京 🙂\n"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.token_text(ids[-1]) == "\n"


def test_part_of_a_character_shows_as_a_replacement(tokenizer):
    assert "\ufffd" in tokenizer.token_text(tokenizer.encode("🙂")[0])


def test_control_ids_are_the_special_tokens_and_the_tags(tokenizer):
    spellings = {tokenizer.token_text(token_id) for token_id in tokenizer.control_ids}
    assert {"<s>", "</s>", "<|im_start|>", "<mask:1>", "<think>", "</tool_call>"} <= spellings
    assert not any(tokenizer.token_bytes(token_id) == b"\n" for token_id in tokenizer.control_ids)


def test_added_tokens_that_are_no_tags_are_not_control_tokens(tokenizer_folder):
    description = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    size = Tokenizer(description).vocab_size
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    description["added_tokens"].append({"id": size, "content": "7777", **flags})
    grown = Tokenizer(description)
    assert grown.vocab_size == size + 1
    assert grown.encode("a7777")[-1] == size
    assert size not in grown.control_ids


def test_unknown_ids_stand_for_nothing(tokenizer):
    assert tokenizer.decode([-1, tokenizer.vocab_size, 10**9]) == ""
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"


def test_roles_come_from_the_config(tokenizer):
    assert tokenizer.role_tokens["cls_token"] == "<|begin_of_sentence|>"
    assert tokenizer.role_tokens["mask_token"] == "<mask:1>"


def test_a_vocabulary_that_finds_control_spellings_whole_is_cut_inside_them(tokenizer_folder):
    description = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    size = Tokenizer(description).vocab_size
    vocab = {token["content"]: token["id"] for token in description["added_tokens"]} | {"<|x|>": size}
    description["model"]["vocab"].update(vocab)
    description["model"]["ignore_merges"] = True
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    description["added_tokens"].append({"id": size, "content": "<|x|>", **flags})
    tokenizer = Tokenizer(description)
    assert tokenizer.encode("<|x|>") == [size]
    assert size not in tokenizer.encode("<|x|>", parse_special=False)
    assert tokenizer.decode(tokenizer.encode("<|x|>", parse_special=False)) == "<|x|>"


def test_other_decoders_are_refused_by_name():
    built = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    built.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(CheckpointError, match="WordPiece"):
        Tokenizer(json.loads(built.to_str()))


def test_a_long_text_without_breaks_comes_back(tokenizer):
    rng = random.Random(5)
    text = "".join(rng.choice("ab <|>你\n") for _ in range(20_000))
    assert tokenizer.decode(tokenizer.encode(text)) == text
