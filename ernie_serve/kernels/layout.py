"""Where the tokens of one step stand: in the batch, in their texts, and in the paged KV cache.

Knows positions, slots and block tables as tensors. Knows nothing of requests, plans or the network.
"""

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
    def decodes(self) -> "Decodes | None":
        """The requests with one token, by themselves; `None` if all are or none is. Made once a step, not a layer."""
        which = [r for r, span in enumerate(self.spans) if span.query_len == 1]
        if len(which) in (0, len(self.spans)):
            return None
        spans = tuple(self.spans[r] for r in which)
        where = self.block_tables.device
        rows, tokens = (torch.tensor(x, device=where) for x in (which, [span.query_start for span in spans]))
        return Decodes(tokens, self.block_tables[rows], self.context_lens[rows], spans)


@dataclass(frozen=True, slots=True)
class Decodes:
    """The D requests of a layout that have one token: where that stands in the batch, their blocks and lengths."""

    tokens: Tensor  # [D] int64, into T
    block_tables: Tensor  # [D, blocks] int32
    context_lens: Tensor  # [D] int32
    spans: tuple["Span", ...]


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
