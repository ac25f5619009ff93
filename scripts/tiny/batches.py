"""Turns drawn documents into micro-batches of token ids, similar lengths together, always the same for a seed.

Knows the mixture and the curriculum. Knows no tensors and no network.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from tiny import copying, talk, tooluse
from tiny.dialogue import Dialogue
from tiny.words import Words

Pieces = list[tuple[str, bool]]
Draw = Callable[[Words], list[Pieces]]
"""Gives documents that belong into one step, mostly one alone."""

DECISION = 3.0
"""The weight of the first token of each of the model's turns, where it decides between words and a call, and of the
first of a called tool's name, where it decides for one of the list."""
PROMPT_LATER = 0.1
"""What is left at the end of the share of a prompt's tokens that are learned too: what tools and questions look like
is soon known, and from then on it would drown what the model has to decide."""
NAME_FOLLOWS = '{"name":\u2581"'


@dataclass(frozen=True)
class Document:
    """Token ids, and how much the network is to learn to say each."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Source:
    """A kind of document and its share at the start and at the end of training."""

    draw: Draw
    first: float
    last: float


def plain(words: Words) -> Pieces:
    """Text with its end: all of it is to be learned."""
    return [(talk.plain(words) + "</s>", True)]


def told(draw: Callable[[Words], Dialogue]) -> Draw:
    """A dialogue as a document alone."""
    return lambda words: [draw(words).document()]


def contrast(words: Words) -> list[Pieces]:
    """One question over several lists, several questions over one list."""
    return [dialogue.document() for dialogue in tooluse.contrast(words)]


SOURCES = [
    Source(lambda w: [copying.lesson(w)], 8.0, 0.6),
    Source(lambda w: [plain(w)], 0.6, 0.8),
    Source(told(talk.small_talk), 1.0, 1.8),
    Source(told(talk.identity), 0.3, 0.8),
    Source(told(talk.memory), 2.0, 1.0),
    Source(told(talk.persona), 0.5, 0.6),
    Source(told(talk.task), 1.0, 1.0),
    Source(told(lambda w: tooluse.single(w, size=1)), 2.0, 0.4),
    Source(told(tooluse.single), 1.0, 3.0),
    Source(told(tooluse.parallel), 0.3, 1.6),
    Source(told(tooluse.together), 0.1, 0.4),
    Source(told(tooluse.no_tool), 0.8, 2.5),
    Source(told(tooluse.session), 0.2, 1.2),
    Source(contrast, 0.6, 3.5),
    Source(told(tooluse.drill), 0.3, 7.0),
]


class Batches:
    """Steps of micro-batches. `step(n)` depends on the seed and on `n` alone, so that training can resume anywhere."""

    def __init__(
        self, tokenizer: Tokenizer, seed: int, tokens: int, micro_tokens: int, longest: int, prompt_share: float
    ) -> None:
        self.tokenizer = tokenizer
        self.name_follows = tokenizer.token_to_id(NAME_FOLLOWS)
        self.seed = seed
        self.tokens, self.micro_tokens, self.longest = tokens, micro_tokens, longest
        self.prompt_share = prompt_share

    def step(self, number: int, progress: float) -> list[list[Document]]:
        """About `tokens` tokens in micro-batches; `progress` from 0 to 1 is the place in the curriculum."""
        rng = random.Random(self.seed * 1_000_003 + number)
        words = Words(rng)
        place = min(1.0, progress)
        shares = [s.first + (s.last - s.first) * place for s in SOURCES]
        prompt_share = self.prompt_share * (1.0 + (PROMPT_LATER - 1.0) * place)
        documents: list[Document] = []
        total = 0
        while total < self.tokens:
            drawn = rng.choices(SOURCES, shares, k=16)
            for document in self.encode([p for source in drawn for p in source.draw(words)], rng, prompt_share):
                if len(document.ids) <= self.longest:
                    documents.append(document)
                    total += len(document.ids)
        return list(self.grouped(documents))

    def encode(self, drawn: list[Pieces], rng: random.Random, prompt_share: float) -> Iterator[Document]:
        """Each list of pieces as a document. Of the prompt, `prompt_share` of the tokens is learned too."""
        flat = self.tokenizer.encode_batch_fast(
            [text for pieces in drawn for text, _ in pieces], add_special_tokens=False
        )
        encoded = iter(flat)
        for pieces in drawn:
            ids: list[int] = []
            weights: list[float] = []
            for _, own in pieces:
                part = next(encoded).ids
                start = len(ids)
                ids += part
                if own:
                    after = zip([None, *part], part, strict=False)
                    weights += [DECISION if before == self.name_follows else 1.0 for before, _ in after]
                else:
                    weights += [float(rng.random() < prompt_share) for _ in part]
                if own and start:
                    weights[start] = DECISION
            yield Document(ids, weights)

    def grouped(self, documents: list[Document]) -> Iterator[list[Document]]:
        """Micro-batches of at most `micro_tokens` tokens with their padding."""
        group: list[Document] = []
        for document in sorted(documents, key=lambda d: len(d.ids)):
            if group and len(document.ids) * (len(group) + 1) > self.micro_tokens:
                yield group
                group = []
            group.append(document)
        yield group
