"""Rows sorted by expert, each expert's share filled up to whole blocks of BM rows.

One program, so that nothing has to be synchronised: a first pass over the pairs counts them, a second gives each its
place. A pair is a token and one of its slots; slots from A on are the S parts of the shared MLP, which every token
takes, as experts E to E + S - 1. Pairs that route nowhere (an id below 0) come last, as expert E + S.

Bytes moved: 4 T A read twice, 4 bytes written a place. The time is latency: it is as long as its two loops.
Source: own; the block-aligned order is vLLM's and SGLang's idea.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels.triton.launching import power_of_two

# T tokens, A active experts, E experts, S parts of the shared MLP, M pairs T (A + S), BM rows of a block

_PAIRS = 128  # looked at together


@triton.jit
def _expert_of(ids, pair, num_pairs, A: tl.constexpr, S: tl.constexpr, E: tl.constexpr):
    """The expert of each pair, E + S where it has none, above that beyond the last pair."""
    slot = pair % (A + S)
    is_routed = (slot < A) & (pair < num_pairs)
    found = tl.load(ids + pair // (A + S) * A + slot, mask=is_routed, other=-1).to(tl.int32)
    expert = tl.where(slot < A, tl.where(found < 0, E + S, found), E + slot - A)
    return tl.where(pair < num_pairs, expert, E + S + 1)


@triton.jit
def _align(ids, order, block_experts, num_pairs, num_blocks, A: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
           BE: tl.constexpr, BM: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    experts = tl.arange(0, BE)
    counts = tl.zeros((BE,), tl.int32)
    for first in range(0, num_pairs, PAIRS):
        expert = _expert_of(ids, first + tl.arange(0, PAIRS), num_pairs, A, S, E)
        counts += tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), axis=0)
    blocks = tl.where(experts <= E + S, (counts + BM - 1) // BM, 0)
    ends = tl.cumsum(blocks, axis=0)
    for first in range(0, num_blocks, PAIRS):
        block = first + tl.arange(0, PAIRS)
        expert = tl.sum((block[:, None] >= ends[None, :]).to(tl.int32), axis=1)  # so many end before it
        tl.store(block_experts + block, tl.where(expert <= E + S, expert, -1), mask=block < num_blocks)
    for first in range(0, num_blocks * BM, PAIRS):
        place = first + tl.arange(0, PAIRS)
        tl.store(order + place, tl.zeros((PAIRS,), tl.int32) - 1, mask=place < num_blocks * BM)
    tl.debug_barrier()  # places are filled by other threads than those that cleared them
    next_place = (ends - blocks) * BM
    for first in range(0, num_pairs, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        expert = _expert_of(ids, pair, num_pairs, A, S, E)
        is_its = (expert[:, None] == experts[None, :]).to(tl.int32)
        before = tl.cumsum(is_its, axis=0) - is_its
        place = tl.sum(is_its * (before + next_place[None, :]), axis=1)
        tl.store(order + place, pair, mask=pair < num_pairs)
        next_place += tl.sum(is_its, axis=0)


def align(ids: Tensor, num_experts: int, shared_parts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Pairs in the order of their experts, -1 where a block is not full; and each block's expert, -1 beyond the last.

    `ids` is [T, A]; the results are [blocks * rows] and [blocks] in int32, as long as they can get.
    """
    T, A = ids.shape
    num_pairs = T * (A + shared_parts)
    num_blocks = most_blocks(num_pairs, num_experts + shared_parts + 1, rows)
    order = torch.empty(num_blocks * rows, dtype=torch.int32, device=ids.device)
    block_experts = torch.empty(num_blocks, dtype=torch.int32, device=ids.device)
    _align[(1,)](
        ids,
        order,
        block_experts,
        num_pairs,
        num_blocks,
        A=A,
        S=shared_parts,
        E=num_experts,
        BE=power_of_two(num_experts + shared_parts + 2),
        BM=rows,
        PAIRS=_PAIRS,
        num_warps=8,
    )
    return order, block_experts


def align_many(ids: Tensor, num_experts: int, shared_parts: int, rows: int) -> tuple[Tensor, Tensor]:
    """The same by sorting, in plain torch: for prompts, whose pairs are too many for one program."""
    T = len(ids)
    E, S = num_experts, shared_parts
    routed = torch.where(ids < 0, E + S, ids.long())
    parts = torch.arange(E, E + S, device=ids.device).expand(T, S)
    experts = torch.cat((routed, parts), dim=1).flatten()
    counts = torch.zeros(E + S + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    blocks = (counts + rows - 1) // rows
    ends = blocks.cumsum(0)
    sorted_pairs = experts.argsort(stable=True)
    sorted_experts = experts[sorted_pairs]
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(experts), device=ids.device) - first[sorted_experts]
    num_blocks = most_blocks(len(experts), E + S + 1, rows)
    order = torch.full((num_blocks * rows,), -1, dtype=torch.int32, device=ids.device)
    order[(ends - blocks)[sorted_experts] * rows + rank] = sorted_pairs.int()
    found = torch.searchsorted(ends, torch.arange(num_blocks, device=ids.device), right=True)
    return order, torch.where(found <= E + S, found, -1).int()


def most_blocks(num_pairs: int, num_experts: int, rows: int) -> int:
    """How many blocks there can be: one that is not full for every expert, and the full ones."""
    return min(num_pairs, num_experts) + num_pairs // rows
