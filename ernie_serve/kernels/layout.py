"""Where the tokens of one step stand: in the batch, in their texts, and in the paged KV cache.

Knows positions, slots and block tables as tensors. Knows nothing of requests, plans or the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


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
    def indices(self) -> tuple[Tensor, ...]:
        """For each request its blocks as an index of the cache. Made once a step, not twice a layer."""
        return self.block_tables.long().unbind()

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
class Span:
    """One request of a layout, in plain numbers, for code that loops over requests on the host."""

    query_start: int
    query_len: int
    context_len: int

    @property
    def start(self) -> int:
        """Position of the first token that the step computes."""
        return self.context_len - self.query_len
