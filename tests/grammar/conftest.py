"""A small vocabulary of the family's kind, and answers made by chance alone."""

import random
from dataclasses import dataclass

import pytest

from ernie_serve.grammar.compiler import GrammarCompiler, Vocabulary
from ernie_serve.grammar.matcher import MaskFiller
from ernie_serve.model.random_tokenizer import random_tokenizer
from ernie_serve.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(random_tokenizer(1024))


@pytest.fixture(scope="session")
def vocabulary(tokenizer):
    return Vocabulary.of(tokenizer)


@pytest.fixture(scope="session")
def compiler(vocabulary):
    return GrammarCompiler(vocabulary)


@pytest.fixture(scope="session")
def allows():
    """`allows(grammar, text)`: whether the grammar permits this text and then the end, byte by byte."""
    compiler = GrammarCompiler(Vocabulary([bytes([byte]) for byte in range(256)]))

    def check(grammar, text):
        matcher, ids = compiler.matcher(grammar)._matcher, list(text.encode())
        return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()

    return check


@dataclass(frozen=True)
class Answer:
    text: str
    ids: list[int]
    is_whole: bool


@pytest.fixture(scope="session")
def answer(compiler, vocabulary, tokenizer):
    """`answer(grammar, seed)`: what weights that know nothing say under a grammar, a little drawn to its end."""
    filler, size, n = MaskFiller(1), vocabulary.bytes_per_mask, vocabulary.size
    closing = [i for i, token in enumerate(vocabulary.tokens) if token in (b'"', b"}", b"]", b'"}', b"\n")]

    def say(grammar, seed=0, max_tokens=400, haste=0.4):
        matcher, chance, ids = compiler.matcher(grammar), random.Random(seed), []
        is_whole = False
        while len(ids) < max_tokens and not is_whole:
            row = bytearray(size)
            filler.fill([(matcher, 0)], row, size)
            assert not matcher.error
            bits = int.from_bytes(row, "little")
            may_end, bits = bits >> n & 1, bits & (1 << n) - 1
            assert may_end or bits, "a dead end"
            if may_end and (not bits or chance.random() < haste):
                is_whole = True
                break
            allowed = [i for i in range(n) if bits >> i & 1]
            hasty = [i for i in closing if bits >> i & 1]
            ids.append(chance.choice(hasty if hasty and chance.random() < haste else allowed))
            matcher.advance(ids[-1])
            assert not matcher.error
            is_whole = matcher.has_ended
        return Answer(tokenizer.decode(ids, skip_special_tokens=False), ids, is_whole)

    return say
