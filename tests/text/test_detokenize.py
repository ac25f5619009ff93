import random

import pytest

from ernie_serve.text.detokenize import Detokenizer

TEXTS = [
    " Hello, who are you?",
    "你好，世界！ 鑫龘 end",
    "🙂👩‍👩‍👧 émoji\n\n\ttail ",
    "<think>\nno\n</think>\n\n<response>\nyes\n</response>\n",
]


def stream(tokenizer, ids, rng, prompt=(), **options):
    """The text of ids pushed in random cuts, and every piece of it."""
    detokenizer = Detokenizer(tokenizer, prompt, **options)
    pieces, at = [], 0
    while at < len(ids):
        step = rng.randint(1, 4)
        pieces.append(detokenizer.push(ids[at : at + step]))
        at += step
    pieces.append(detokenizer.flush())
    return pieces


@pytest.mark.parametrize("text", TEXTS)
def test_any_cut_of_a_text_gives_the_same_text_in_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    for seed in range(20):
        pieces = stream(tokenizer, ids, random.Random(seed))
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_random_ids_stream_as_they_decode(tokenizer, skip_special_tokens):
    """Most random ids are broken bytes, special tokens among them."""
    for seed in range(200):
        rng = random.Random(seed)
        ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randint(0, 40))]
        whole = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        assert "".join(stream(tokenizer, ids, rng, skip_special_tokens=skip_special_tokens)) == whole


@pytest.mark.parametrize("text", ["x鑫y", "x🙂y"])
def test_a_prompt_that_ends_inside_a_character_is_continued(tokenizer, text):
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids)):
        shown = "".join(stream(tokenizer, ids[cut:], random.Random(cut), prompt=ids[:cut]))
        before = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert before + shown == text


def test_a_character_cut_off_by_the_end_is_replaced_once_the_text_ends(tokenizer):
    ids = tokenizer.encode("a🙂")[:-1]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(ids) == "a"
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_hidden_or_shown(tokenizer):
    ids = tokenizer.encode("a<|im_end|>b")
    assert Detokenizer(tokenizer).push(ids) == "ab"
    assert Detokenizer(tokenizer, skip_special_tokens=False).push(ids) == "a<|im_end|>b"
