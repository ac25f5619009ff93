"""Where the tokens of one step stand: in the batch, in their texts, and in the paged KV cache.

Knows positions, slots and block tables as tensors. Knows nothing of requests, plans or the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 1 << 23
SHORT = 16384
"""Tokens times their context, of a request that is a run by itself; and tokens of the contexts of a run of several."""


@dataclass(frozen=True)
class Layout:
    """T tokens of R requests, flattened one request after the other.

    Request r owns tokens `query_starts[r] : query_starts[r + 1]`; they are the last of the `context_lens[r]` tokens
    that it has in the cache once the step has written its own. Position p of request r lies in block
    `block_tables[r, p // block_size]` at offset `p % block_size`, and `slots` says the same for the tokens of the
    step as `block * block_size + offset`. Columns of `block_tables` beyond a request's blocks mean nothing.
    """

    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    block_tables: Tensor  # [R, blocks] int32
    query_starts: Tensor  # [R + 1] int32
    context_lens: Tensor  # [R] int32
    spans: tuple["Span", ...]
    block_size: int

    @cached_property
    def first_blocks(self) -> list[int | None]:
        """For each request the first of its blocks if they follow one another in memory, else `None`."""
        tables = self.block_tables.numpy(force=True)
        counts = [-(-span.context_len // self.block_size) for span in self.spans]
        return [
            int(table[0]) if bool((np.diff(table[:count]) == 1).all()) else None
            for table, count in zip(tables, counts, strict=True)
        ]

    @cached_property
    def runs(self) -> tuple["Run", ...]:
        """The requests with several tokens, in runs of neighbours. Made once a step, not a layer.

        One whose attention takes longer than a call of it is a run by itself. The contexts of several are together no
        longer than `SHORT`, so that little is gathered at once.
        """
        found, room = list[slice](), 0
        for r, span in enumerate(self.spans):
            is_large = span.query_len * span.context_len >= LARGE
            if span.query_len == 1:
                room = 0
            elif is_large or span.context_len > room:
                found.append(slice(r, r + 1))
                room = 0 if is_large else SHORT - span.context_len
            else:
                found[-1] = slice(found[-1].start, r + 1)
                room -= span.context_len
        return tuple(map(self._run, found))

    def _run(self, mine: slice) -> "Run":
        """Nothing here is brought from the host, which would wait for all that a GPU has still to do."""
        spans = self.spans[mine]
        queries = self.query_starts[mine.start : mine.stop + 1] - self.query_starts[mine.start]
        ends = self.context_lens[mine].cumsum(0, dtype=torch.int32)
        starts = F.pad(ends, (1, 0))
        at = torch.arange(sum(s.context_len for s in spans), dtype=torch.int32, device=ends.device)
        request = torch.searchsorted(ends, at, right=True)
        at = (at - starts[request]).long()
        blocks = self.block_tables[mine][request, at // self.block_size]
        return Run(spans, blocks.long() * self.block_size + at % self.block_size, queries, starts)

    @cached_property
    def decodes(self) -> "Ends | None":
        """The requests with one token, by themselves; `None` if all are or none is. Made once a step, not a layer."""
        which = [r for r, span in enumerate(self.spans) if span.query_len == 1]
        return None if len(which) in (0, len(self.spans)) else self.ends(which)

    def ends(self, requests: Sequence[int]) -> "Ends":
        """The last token of each of these requests, without those before it."""
        spans = [self.spans[r] for r in requests]
        where = self.block_tables.device
        rows = torch.tensor(requests, dtype=torch.int64, device=where)
        tokens = torch.tensor([s.query_start + s.query_len - 1 for s in spans], dtype=torch.int64, device=where)
        alone = Layout(
            positions=self.positions[tokens],
            slots=self.slots[tokens],
            block_tables=self.block_tables[rows],
            query_starts=torch.arange(len(spans) + 1, dtype=torch.int32, device=where),
            context_lens=self.context_lens[rows],
            spans=tuple(Span(i, 1, span.context_len) for i, span in enumerate(spans)),
            block_size=self.block_size,
        )
        return Ends(tokens, alone)


@dataclass(frozen=True, slots=True)
class Ends:
    """The last tokens of R requests of a layout: where they stand in it, and their layout by themselves."""

    tokens: Tensor  # [R] int64, into T
    layout: Layout


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbours of a layout with several tokens each, and where their contexts, one behind the other, lie."""

    spans: tuple["Span", ...]
    slots: Tensor  # [L] int64, of all tokens of all contexts
    query_starts: Tensor  # [len(spans) + 1] int32, from 0
    context_starts: Tensor  # [len(spans) + 1] int32, into L

    @property
    def tokens(self) -> slice:
        """Its tokens in the step."""
        return slice(self.spans[0].query_start, self.spans[-1].query_start + self.spans[-1].query_len)


@dataclass(frozen=True, slots=True)
class Span:
    """One request of a layout, in plain numbers, for code that loops over requests on the host."""

    query_start: int
    query_len: int
    context_len: int

    @property
    def start(self) -> int:
        """Position of the first token that the step computes."""
        return self.context_len - self.query_len
