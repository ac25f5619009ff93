"""Turns drawn documents into micro-batches of token ids, similar lengths together, always the same for a seed.

Knows the mixture and the curriculum. Knows no tensors and no network.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from tiny import copying, talk, tooluse
from tiny.words import Words

Pieces = list[tuple[str, bool]]
Draw = Callable[[Words], Pieces]


@dataclass(frozen=True)
class Document:
    """Token ids, and for each whether the network is to learn to say it."""

    ids: list[int]
    learn: list[bool]


@dataclass(frozen=True)
class Source:
    """A kind of document and its share at the start and at the end of training."""

    draw: Draw
    first: float
    last: float


def plain(words: Words) -> Pieces:
    """Text with its end: all of it is to be learned."""
    return [(talk.plain(words) + "</s>", True)]


SOURCES = [
    Source(copying.lesson, 8.0, 1.0),
    Source(plain, 0.6, 1.0),
    Source(lambda w: talk.small_talk(w).document(), 1.0, 3.0),
    Source(lambda w: talk.memory(w).document(), 2.0, 2.5),
    Source(lambda w: talk.persona(w).document(), 0.5, 0.7),
    Source(lambda w: talk.task(w).document(), 1.0, 1.5),
    Source(lambda w: tooluse.single(w, size=1).document(), 2.0, 0.5),
    Source(lambda w: tooluse.single(w).document(), 1.0, 4.5),
    Source(lambda w: tooluse.parallel(w).document(), 0.3, 1.5),
    Source(lambda w: tooluse.together(w).document(), 0.1, 0.5),
    Source(lambda w: tooluse.no_tool(w).document(), 0.5, 2.5),
]


class Batches:
    """Steps of micro-batches. `step(n)` depends on the seed and on `n` alone, so that training can resume anywhere."""

    def __init__(
        self, tokenizer: Tokenizer, seed: int, tokens: int, micro_tokens: int, longest: int, prompt_share: float
    ) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.tokens, self.micro_tokens, self.longest = tokens, micro_tokens, longest
        self.prompt_share = prompt_share

    def step(self, number: int, progress: float) -> list[list[Document]]:
        """About `tokens` tokens in micro-batches; `progress` from 0 to 1 is the place in the curriculum."""
        rng = random.Random(self.seed * 1_000_003 + number)
        words = Words(rng)
        shares = [s.first + (s.last - s.first) * min(1.0, progress) for s in SOURCES]
        documents: list[Document] = []
        total = 0
        while total < self.tokens:
            drawn = rng.choices(SOURCES, shares, k=16)
            for document in self.encode([source.draw(words) for source in drawn], rng):
                if len(document.ids) <= self.longest:
                    documents.append(document)
                    total += len(document.ids)
        return list(self.grouped(documents))

    def encode(self, drawn: list[Pieces], rng: random.Random) -> Iterator[Document]:
        """Each list of pieces as a document. Of the prompt, a random share of the tokens is learned too."""
        flat = self.tokenizer.encode_batch_fast(
            [text for pieces in drawn for text, _ in pieces], add_special_tokens=False
        )
        encoded = iter(flat)
        for pieces in drawn:
            ids: list[int] = []
            learn: list[bool] = []
            for _, own in pieces:
                part = next(encoded).ids
                ids += part
                learn += [True] * len(part) if own else [rng.random() < self.prompt_share for _ in part]
            yield Document(ids, learn)

    def grouped(self, documents: list[Document]) -> Iterator[list[Document]]:
        """Micro-batches of at most `micro_tokens` tokens with their padding."""
        group: list[Document] = []
        for document in sorted(documents, key=lambda d: len(d.ids)):
            if group and len(document.ids) * (len(group) + 1) > self.micro_tokens:
                yield group
                group = []
            group.append(document)
        yield group
