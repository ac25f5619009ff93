"""Compiles grammars over one vocabulary, and keeps the prepared ones.

Knows llguidance and what bytes tokens stand for. Knows no requests and no tensors. Compiling lets go of the
interpreter lock; how long it may take is `checker`'s to bound, how large a thing may be is `limits`'.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from random import Random
from threading import Lock
from typing import Protocol

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar import sources
from ernie_serve.grammar.matcher import Matcher
from ernie_serve.messages import Grammar


class Tokenizer(Protocol):
    """What a vocabulary is made of."""

    vocab_size: int
    control_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for."""

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """The tokens of a text."""


@dataclass(frozen=True)
class Vocabulary:
    """What each token id stands for. Control tokens are structure: no text in a grammar ever matches one.

    `encode` is how the tokenizer would write a text, without control tokens; where a grammar leaves one text only, it
    is written like that. Without it such text is written byte by byte.
    """

    tokens: Sequence[bytes]
    control_ids: frozenset[int] = frozenset()
    encode: Callable[[str], list[int]] | None = None

    @classmethod
    def of(cls, tokenizer: "Tokenizer") -> "Vocabulary":
        """What grammars need to know of a tokenizer."""
        tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        return cls(tokens, tokenizer.control_ids, partial(tokenizer.encode, parse_special=False))

    @property
    def size(self) -> int:
        """How many ids there are; one more bit of a mask says whether the answer may end."""
        return len(self.tokens)

    @property
    def bytes_per_mask(self) -> int:
        """Bytes of one row of a mask: a bit for each id and one for the end, in whole words of 4."""
        return (self.size + 32) // 32 * 4

    def encode_bytes(self, text: str) -> list[int]:
        """A text in tokens of one byte; bytes that have none are left out."""
        return [self._byte_ids[byte] for byte in text.encode("utf-8", "replace") if byte in self._byte_ids]

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        ids = {t[0]: i for i, t in enumerate(self.tokens) if len(t) == 1}
        return {byte: i for byte, i in ids.items() if i not in self.control_ids}

    def essentials(self) -> "Vocabulary":
        """The same ids with nothing but control tokens and single bytes: whatever compiles here compiles there."""
        kept = [t if i in self.control_ids or len(t) == 1 else b"" for i, t in enumerate(self.tokens)]
        return Vocabulary(kept, self.control_ids)


class GrammarCompiler:
    """Safe for threads. Keeps prepared matchers of at most `max_cache_bytes`, as far as their size can be told."""

    def __init__(self, vocabulary: Vocabulary, *, max_cache_bytes: int = 64 << 20) -> None:
        self.vocabulary = vocabulary
        self.max_cache_bytes = max_cache_bytes
        self._tokenizer = _tokenizer(vocabulary)
        self._controls = {i: vocabulary.tokens[i] for i in vocabulary.control_ids}
        self._cache: dict[Grammar, Matcher] = {}  # the least recently used first
        self._cache_bytes = 0
        self._lock = Lock()

    def check(self, grammar: Grammar) -> None:
        """Raise `InvalidRequest`, which says what is wrong, unless the grammar compiles and can be followed a while.

        Some grammars compile, and turn out too complex only where their first answers fork.
        """
        matcher = self._compile(grammar)
        chance = Random(0)  # noqa: S311  # nothing depends on it
        for _ in range(_NUM_TRIED):
            bits = int.from_bytes(matcher.compute_bitmask(), "little") & ((1 << self.vocabulary.size) - 1)
            if matcher.is_error():
                raise InvalidRequest(_said(matcher, grammar))
            if not bits:
                return
            matcher.consume_token(_some_bit(bits, chance))
            if matcher.is_stopped() and not matcher.is_error():
                return

    def cached(self, grammar: Grammar) -> Matcher | None:
        """A fresh matcher if the grammar is prepared already."""
        with self._lock:
            if prepared := self._cache.pop(grammar, None):
                self._cache[grammar] = prepared
                return prepared.copy()
        return None

    def matcher(self, grammar: Grammar) -> Matcher:
        """A fresh matcher, which may take long. Raises `InvalidRequest`."""
        if found := self.cached(grammar):
            return found
        prepared = Matcher(self._compile(grammar))
        with self._lock:
            self._keep(grammar, prepared)
        return prepared.copy()

    def _keep(self, grammar: Grammar, prepared: Matcher) -> None:
        if self._cache.pop(grammar, None) is None:
            self._cache_bytes += _size(grammar)
        self._cache[grammar] = prepared
        while self._cache_bytes > self.max_cache_bytes:
            oldest = next(iter(self._cache))
            del self._cache[oldest]
            self._cache_bytes -= _size(oldest)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        try:
            text = sources.source(grammar, self._controls)
            matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=_LIMITS)
        except InvalidRequest:
            raise
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of the library is no Exception
            raise InvalidRequest(f"The grammar cannot be compiled ({type(error).__name__}).") from error
        if matcher.is_error():
            raise InvalidRequest(_said(matcher, grammar))
        return matcher


_NUM_TRIED = 32


def _some_bit(bits: int, chance: Random) -> int:
    """The place of one of the bits that are set."""
    start = chance.randrange(bits.bit_length())
    return (bits >> start & -(bits >> start)).bit_length() - 1 + start


_LIMITS = LLParserLimits(max_grammar_size=100_000, max_lexer_states=20_000, verbose_errors=False)
_BYTES_EACH = 64 * 1024
_BYTES_PER_BYTE = 40


def _size(grammar: Grammar) -> int:
    """About what a prepared grammar holds in memory, as measured."""
    return _BYTES_EACH + _BYTES_PER_BYTE * len(grammar.text)


def _said(matcher: LLMatcher, grammar: Grammar) -> str:
    """What the library says of its error, short, without its inner state and without what the client did not write."""
    said = matcher.get_error().replace("<non-verbose/>", "").strip()
    if grammar.kind != "lark":
        said = _PLACE.sub("", _LISTING.split(said)[0]).strip()
    if "NoExtensionBias" in said:
        said = "a `$ref` leads back to itself before it says anything"
    if "oneOf" in said:
        said = "`oneOf` is supported only where no value can match two of its branches; use `anyOf`"
    told = f"The grammar cannot be compiled: {' '.join(said.split())[:300].rstrip('.')}."
    if grammar.kind == "lark" and _RULE_IN_GBNF.search(grammar.text):
        told += ' Write it in Lark\'s notation, such as `start: "yes" | "no"`, not in GBNF.'
    return told


_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
_RULE_IN_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
_LISTING = re.compile(r"\n *\d+ \|")


def _tokenizer(vocabulary: Vocabulary) -> LLTokenizer:
    """The library's view: our ids, and after them one that stands for the end of the answer."""
    end_id = vocabulary.size
    source = _TokenSource(
        tokens=[*vocabulary.tokens, b"<end>"],
        special_token_ids=[*sorted(vocabulary.control_ids), end_id],
        eos_token_id=end_id,
        encode=vocabulary.encode or vocabulary.encode_bytes,
    )
    return LLTokenizer(TokenizerWrapper(source), n_vocab=end_id + 1, eos_token=[end_id])


@dataclass
class _TokenSource:
    """What the library asks of a tokenizer."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    encode: Callable[[str], list[int]]
    bos_token_id: int | None = None

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("this tokenizer takes strings")
        return self.encode(text)
