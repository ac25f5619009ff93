"""Rows sorted by expert, each expert's share filled up to whole blocks of BM rows.

One program an expert, none waits for another: each counts the pairs of all experts, a few thousand bytes, and so knows
where its own begin; it ranks them and fills up its last block. A pair is a token and one of its slots; slots from A on
are the S parts of the shared MLP, which every token takes, as experts E to E + S - 1. Pairs that route nowhere (an id
below 0) come last, as expert E + S.

Bytes moved: 4 T A read by each program, from the L2 cache but for the first, and 4 bytes written a place. The time is
latency.
Source: own; the block-aligned order is vLLM's and SGLang's idea.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels.triton.launching import power_of_two

# T tokens, A active experts, E experts, S parts of the shared MLP, M pairs T (A + S), BM rows of a block


@triton.jit(do_not_specialize=["T", "num_blocks"])
def _align(ids, order, block_experts, T, num_blocks, A: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
           BE: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    mine = tl.program_id(0)
    at = tl.arange(0, BP)
    inside = at < T * A
    found = tl.load(ids + at, mask=inside, other=0).to(tl.int32)
    expert = tl.where(inside, tl.where(found < 0, E + S, found), BE - 1)
    experts = tl.arange(0, BE)
    counts = tl.histogram(expert, BE)
    counts = tl.where((experts >= E) & (experts < E + S), T, counts)
    blocks = tl.where(experts <= E + S, (counts + BM - 1) // BM, 0)
    first = tl.sum(tl.where(experts < mine, blocks, 0))
    count = tl.sum(tl.where(experts == mine, counts, 0))
    last = first + tl.sum(tl.where(experts == mine, blocks, 0))
    if (mine >= E) & (mine < E + S):
        token = tl.arange(0, BT)
        tl.store(order + first * BM + token, token * (A + S) + A + mine - E, mask=token < T)
    else:
        is_mine = (expert == mine) & inside
        rank = tl.cumsum(is_mine.to(tl.int32), axis=0) - 1
        tl.store(order + first * BM + rank, at // A * (A + S) + at % A, mask=is_mine)
    rest = first * BM + count + tl.arange(0, BM)
    tl.store(order + rest, tl.zeros((BM,), tl.int32) - 1, mask=rest < last * BM)
    block = tl.arange(0, BE)
    for start in range(first, last, BE):
        tl.store(block_experts + start + block, tl.zeros((BE,), tl.int32) + mine, mask=start + block < last)
    if mine == E + S:  # blocks that nobody needs
        for start in range(last, num_blocks, BE):
            tl.store(block_experts + start + block, tl.zeros((BE,), tl.int32) - 1, mask=start + block < num_blocks)


def align(ids: Tensor, num_experts: int, shared_parts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Pairs in the order of their experts, -1 where a block is not full; and each block's expert, -1 beyond the last.

    `ids` is [T, A] with up to 8,192 numbers; the results are [blocks * rows] and [blocks] in int32, as long as they can
    get. Of blocks beyond the last only the expert is written.
    """
    T, A = ids.shape
    num_blocks = most_blocks(T * (A + shared_parts), num_experts + shared_parts + 1, rows)
    pairs = power_of_two(T * A)
    order = torch.empty(num_blocks * rows, dtype=torch.int32, device=ids.device)
    block_experts = torch.empty(num_blocks, dtype=torch.int32, device=ids.device)
    _align[(num_experts + shared_parts + 1,)](
        ids,
        order,
        block_experts,
        T,
        num_blocks,
        A=A,
        S=shared_parts,
        E=num_experts,
        BE=power_of_two(num_experts + shared_parts + 2),
        BM=rows,
        BP=pairs,
        BT=power_of_two(-(-pairs // A)),  # no less than T, and one for each BP: a kernel less to compile
        num_warps=4 if pairs <= 4096 else 8,
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
