import random
import sys

import pytest
import sentencepiece

from ernie_serve.errors import CheckpointError
from ernie_serve.text.tokenizer import Tokenizer

USER_DEFINED = [*"0123456789", "<|im_start|>", "<think>", "  ", "▁▁▁"]
CONTROL = ["<|begin_of_sentence|>", "<mask:1>"]


def train(folder, lines, **options):
    """Write a small model with the family's settings to tokenizer.model."""
    settings = {
        "vocab_size": 600,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_by_whitespace": False,
        "hard_vocab_limit": False,
        "user_defined_symbols": USER_DEFINED,
        "control_symbols": CONTROL,
        "minloglevel": 3,
    } | options
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file, **settings)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def lines():
    rng = random.Random(1)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "Hello",
        "world",
        "你好",
        "世界",
        "北京",
        "def",
        "(x):",
        "x-1",
        "a",
    ]
    return [" ".join(rng.choices(words, k=12)) for _ in range(300)]


@pytest.fixture(scope="module")
def model(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("spm")
    return folder, train(folder, lines)


def test_encodes_as_sentencepiece_does(model, lines):
    folder, processor = model
    tokenizer = Tokenizer.from_folder(folder)
    rng = random.Random(2)
    letters = "the quick brown你好世界 鑫🙂\n0123  "
    texts = lines[:50] + ["".join(rng.choices(letters, k=rng.randint(1, 30))) for _ in range(300)]
    texts += ["<|im_start|>user 12", "<think>", "", " ", "   leading and trailing   ", "▁"]
    for text in texts:
        assert tokenizer.encode(text) == processor.encode(text), repr(text)
        assert tokenizer.decode(processor.encode(text)) == text.replace("▁", " ")


def test_kinds_of_pieces_are_kept(model):
    folder, processor = model
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == processor.vocab_size()
    expected = {processor.piece_to_id(piece) for piece in ["<unk>", "<s>", "</s>", *CONTROL, "<|im_start|>", "<think>"]}
    assert tokenizer.control_ids == expected
    assert tokenizer.token_bytes(processor.piece_to_id("<0x0A>")) == b"\n"
    assert tokenizer.decode([processor.piece_to_id("<|begin_of_sentence|>")]) == ""
    assert tokenizer.decode([processor.piece_to_id("<think>")]) == "<think>"


def test_without_sentencepiece_the_error_names_the_extra(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match=r"pip install 'ernie-serve\[sentencepiece\]'"):
        Tokenizer.from_folder(model[0])


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer.from_folder(tmp_path)


def test_another_kind_of_model_is_refused(tmp_path, lines):
    train(tmp_path, lines, model_type="unigram", vocab_size=400)
    with pytest.raises(CheckpointError, match="BPE"):
        Tokenizer.from_folder(tmp_path)


def test_a_model_without_byte_pieces_is_refused(tmp_path, lines):
    train(tmp_path, lines, byte_fallback=False, vocab_size=200)
    with pytest.raises(CheckpointError, match="byte pieces"):
        Tokenizer.from_folder(tmp_path)
