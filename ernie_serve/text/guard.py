"""Keeps what a client wrote from becoming a control token, without changing how any other text is tokenised.

Knows a tokenizer's control tokens. Knows nothing about templates, chat or HTTP.

    client strings --mark--> template --> one text with marks --encode--> ids

A mark is the noncharacter U+FDD0, removed from everything a client sends before any is set, so none can be forged. It
stands inside every control token's spelling in a client's string, and at an edge of a string that could become part
of one together with its neighbour. `encode` takes the marks out and tokenises the text whole, as anybody would; only
if a control token then covers a mark, so that at least one of its characters came from a client, is the text cut at
the marks and its pieces tokenised apart.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from ernie_serve.text.tokenizer import Tokenizer, encodable

_MARK = "\ufdd0"
_REPLACED = "\ufffd"


class ControlGuard:
    """Marks client strings, and tokenises the text that a template made of them."""

    def __init__(self, tokenizer: Tokenizer, *, rewritten: bool = False, compared: Iterable[str] = frozenset()) -> None:
        """With `rewritten`, what follows may delete or change letters, so every possible beginning is marked.

        `compared` are words that a template compares strings with; their edges stay unmarked.
        """
        self._tokenizer = tokenizer
        spellings = {spelling for spelling in tokenizer.control_spellings if len(spelling) > 1}
        # A control token of one character has no inside to mark: it cannot be sent at all.
        self._unsendable = [_MARK, *(tokenizer.control_spellings - spellings)]
        self._compared = frozenset(word for word in compared if word.isidentifier())
        begins = {spelling[0] for spelling in spellings} if rewritten else spellings
        self._begin = re.compile(_trie_pattern(begins)) if begins else None
        self._prefixes = {spelling[:n] for spelling in spellings for n in range(1, len(spelling))}
        self._suffixes = {spelling[-n:] for spelling in spellings for n in range(1, len(spelling))}
        self._longest = max(map(len, spellings), default=1) - 1

    def mark(self, value: Any) -> Any:
        """A copy of a JSON value with the strings in it marked, keys included."""
        if isinstance(value, str):
            return self._mark(value, edges=value not in self._compared)
        if isinstance(value, dict):
            return {self._mark(key, edges=not key.isidentifier()): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def mark_whole(self, text: str) -> str:
        """A string marked at its beginning too, so that no control token can be built around it."""
        return _MARK + self._mark(text, edges=True)

    def encode(self, marked: str) -> list[int]:
        """The ids of a text with marks in it: control tokens are only those that no mark stands in."""
        pieces = marked.split(_MARK)
        text = "".join(pieces)
        if len(pieces) == 1:
            return self._tokenizer.encode(text)
        places: list[int] = []
        at = 0
        for piece in pieces[:-1]:
            at += len(piece)
            places.append(at)
        ids, spans = self._tokenizer.encode_with_controls(text)
        if not any(_holds(places, start, end) for start, end in spans):
            return ids
        return self._tokenizer.encode_apart(pieces)

    def reveal(self, marked: str) -> str:
        """The text without its marks."""
        return marked.replace(_MARK, "")

    def _mark(self, text: str, *, edges: bool) -> str:
        """A string with marks inside its control spellings and, where wanted, at its doubtful edges."""
        text = encodable(text)
        for letter in self._unsendable:
            text = text.replace(letter, _REPLACED)
        places = {found.start() + 1 for found in self._begin.finditer(text)} if self._begin else set()
        if edges and any(text[:n] in self._suffixes for n in range(1, min(len(text), self._longest) + 1)):
            places.add(0)
        if edges and any(text[-n:] in self._prefixes for n in range(1, min(len(text), self._longest) + 1)):
            places.add(len(text))
        if self._tokenizer.respells_controls:
            places.update(self._respelled(text))
        return _MARK.join(_cut(text, places)) if places else text

    def _respelled(self, text: str) -> Iterable[int]:
        """Places in what this tokenizer's normaliser turns into a control token, and the outer edges of the words."""
        yield len(text) - len(text.lstrip())
        yield len(text.rstrip())
        for start, end in self._tokenizer.encode_with_controls(text)[1]:
            yield from range(start + 1, end + 1)


def _holds(places: list[int], start: int, end: int) -> bool:
    """Whether one of the sorted places is strictly between start and end."""
    index = bisect_right(places, start)
    return index < len(places) and places[index] < end


def _cut(text: str, places: Iterable[int]) -> list[str]:
    return [text[start:end] for start, end in pairwise([0, *sorted(places), len(text)])]


def _trie_pattern(words: Iterable[str]) -> str:
    """A pattern that finds every place where a word begins, overlapping ones too, in one pass over the text."""
    trie: dict[str, Any] = {}
    for word in words:
        node = trie
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}
    first = {letter: _branch(node) for letter, node in trie.items()}
    return "|".join(f"{re.escape(letter)}(?={rest})" if rest else re.escape(letter) for letter, rest in first.items())


def _branch(node: dict[str, Any]) -> str:
    """The rest of the words below a node; empty where one ends, for the longer ones begin there too."""
    if "" in node:
        return ""
    rests = [re.escape(letter) + _branch(child) for letter, child in node.items()]
    return rests[0] if len(rests) == 1 else f"(?:{'|'.join(rests)})"
