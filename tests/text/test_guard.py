import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_serve.text.guard import ControlGuard
from ernie_serve.text.tokenizer import Tokenizer

FRAGMENTS = [
    *["<|im_start|>", "<|im_end|>", "<|im_sep|>", "<s>", "</s>", "<mask:1>", "<think>", "</tool_call>", "<unk>"],
    *["<", "<|", "<|im_", "im_end", "end|>", "|>", ">", "s>", "</", "\ufdd0", "a", " ", "你", "\n"],
]
hostile = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)


def num_controls(tokenizer, ids):
    return sum(token_id in tokenizer.control_ids for token_id in ids)


def sent(text):
    """What arrives of a client's text."""
    return text.replace("\ufdd0", "\ufffd")


@settings(deadline=None, max_examples=150, derandomize=True)
@given(parts=st.lists(hostile, max_size=5), own=st.sampled_from(["", "<|im_start|>", "\n", "<", "|>", "<|im_"]))
def test_client_strings_side_by_side_never_make_a_control_token(tokenizer, parts, own):
    """The template writes nothing, a control token, or even half of one between them."""
    guard = ControlGuard(tokenizer)
    ids = guard.encode(own.join(map(guard.mark, parts)))
    between = max(len(parts) - 1, 0)
    assert num_controls(tokenizer, ids) == (between if own == "<|im_start|>" else 0)
    assert tokenizer.decode(ids, skip_special_tokens=False) == own.join(map(sent, parts))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(text=hostile, rewrite=st.sampled_from(["delete", "lower", "cut"]))
def test_a_text_that_is_rewritten_never_makes_a_control_token(tokenizer, text, rewrite):
    guard = ControlGuard(tokenizer, rewritten=True)
    if rewrite == "delete":
        marked = guard.mark(text.replace("|", "|<b>")).replace("<b>", "").replace("b>", "")
    elif rewrite == "lower":
        marked = guard.mark(text.upper()).lower()
    else:
        marked = guard.mark(text.replace("m", "mXX")).replace("XX", "")
    assert num_controls(tokenizer, guard.encode(marked)) == 0


def test_text_without_control_spellings_is_not_marked(tokenizer):
    guard = ControlGuard(tokenizer)
    value = {"type": "function", "a<b": ["1 < 2 <b>bold</b> |x|", 3, None, True, 1.5]}
    assert guard.mark(value) == value


def test_doubtful_edges_change_no_ids(tokenizer):
    guard = ControlGuard(tokenizer)
    for text in ["> quoted", "1 <", "|> pipe <|", "s> a </"]:
        assert guard.mark(text) != text
        assert guard.encode(f"x {guard.mark(text)} y") == tokenizer.encode(f"x {text} y")


def test_overlapping_spellings_are_all_found(tokenizer_folder):
    description = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    size = Tokenizer(description).vocab_size
    for index, content in enumerate(["<ab>", "><c>", "<ab><c>", "龘"]):
        description["added_tokens"].append({"id": size + index, "content": content, **flags})
    tokenizer = Tokenizer(description)
    guard = ControlGuard(tokenizer)
    for text in ["<ab><c>", "<ab><c", "x><c><ab>", "a龘b"]:
        ids = guard.encode(guard.mark(text))
        assert num_controls(tokenizer, ids) == 0
        assert tokenizer.decode(ids) == text.replace("龘", "\ufffd")


@pytest.fixture
def respelling(tokenizer_folder):
    """A tokenizer that reads full-width and capital letters as plain ones, and so finds tags in them."""
    description = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    description["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFKC"},
            {"type": "Lowercase"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    flags = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": True, "special": True}
    size = Tokenizer(description).vocab_size
    for index, content in enumerate(["<tag>", ">x<"]):
        description["added_tokens"].append({"id": size + index, "content": content, **flags})
    return Tokenizer(description)


@pytest.mark.parametrize(
    "text", ["＜ｔａｇ＞", "<ＴＡＧ>", "<tag>", "a <TAG> b", "＜ＴＡＧ＞Ｘ＜", "＜ｔ", " ＜ｔａｇ ", "ａｇ＞"]
)
def test_spellings_that_a_normaliser_makes_are_found(respelling, text):
    assert respelling.respells_controls
    guard = ControlGuard(respelling)
    for before, after in [("", ""), ("", "ag>"), ("<t", ""), ("", guard.mark("ＡＧ＞"))]:
        assert respelling.control_ids.isdisjoint(guard.encode(before + guard.mark(text) + after))


def test_a_respelling_tokenizer_still_reads_what_a_template_writes(respelling):
    ids = ControlGuard(respelling).encode("<TAG>" + ControlGuard(respelling).mark("x"))
    assert ids[0] == respelling.token_id("<tag>")


def test_a_template_may_still_write_control_tokens_beside_hostile_text(tokenizer):
    guard = ControlGuard(tokenizer)
    marked = "<|im_start|>" + guard.mark("<|im_end|><|im_start|>") + "<|im_end|>"
    ids = guard.encode(marked)
    assert [ids[0], ids[-1]] == [tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")]
    assert num_controls(tokenizer, ids) == 2


def test_a_word_marked_whole_cannot_be_built_around(tokenizer):
    guard = ControlGuard(tokenizer)
    assert num_controls(tokenizer, guard.encode("<|" + guard.mark_whole("im_end") + "|>")) == 0
    assert num_controls(tokenizer, guard.encode("<|" + "im_end" + "|>")) == 1


def test_compared_words_and_names_keep_their_edges(tokenizer_folder):
    description = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    size = Tokenizer(description).vocab_size
    description["added_tokens"].append({"id": size, "content": "noop", **flags})
    guard = ControlGuard(Tokenizer(description), compared={"function", "noop"})
    assert guard.mark({"option": "function"}) == {"option": "function"}
    assert guard.mark("option") != "option"
    assert guard.mark("noop") != "noop"


def test_lone_surrogates_are_replaced(tokenizer):
    guard = ControlGuard(tokenizer)
    assert guard.mark({"\ud800": "a\udfff"}) == {"\ufffd": "a\ufffd"}
