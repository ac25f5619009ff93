"""Rows sorted by expert, each expert's share filled up to whole blocks of BM rows.

One program an expert, none waits for another: each counts the pairs of all experts, a few thousand bytes, and so knows
where its own begin; it ranks them and fills up its last block. A pair is a token and one of its slots; slots from A on
are the S parts of the shared MLP, which every token takes, as experts E to E + S - 1. Pairs that route nowhere (an id
below 0) come last, as expert E + S. Of a prompt a program reads all pairs twice, some thousands at a time: to count
them, and to rank its own.

Bytes moved: 4 T A read by each program, once or twice, from the L2 cache but for the first, and 4 bytes written a
place. The time is latency.
Source: own; the block-aligned order is vLLM's and SGLang's idea.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels.triton.launching import power_of_two

# T tokens, A active experts, E experts, S parts of the shared MLP, M pairs T (A + S), BM rows of a block

_IN_ONE_PIECE = 8192
_A_PIECE = 4096
"""Pairs that a program has all at once; and how many at a time where there are more."""


@triton.jit
def _experts_of(ids, at, count, E: tl.constexpr, S: tl.constexpr, BE: tl.constexpr):
    """The expert of each pair `at`; beyond the last one that is none."""
    found = tl.load(ids + at, mask=at < count, other=0).to(tl.int32)
    return tl.where(at < count, tl.where(found < 0, E + S, found), BE - 1)


@triton.jit(do_not_specialize=["T", "num_blocks"])
def _align(ids, order, block_experts, places, ends, T, num_blocks, A: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
           BE: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, ONCE: tl.constexpr,
           SORTS: tl.constexpr):  # fmt: skip
    mine = tl.program_id(0)
    at = tl.arange(0, BP)
    end = BP if ONCE else T * A
    experts = tl.arange(0, BE)
    counts = tl.zeros((BE,), tl.int32)
    for start in range(0, end, BP):
        counts += tl.histogram(_experts_of(ids, start + at, T * A, E, S, BE), BE)
    counts = tl.where((experts >= E) & (experts < E + S), T, counts)
    blocks = tl.where(experts <= E + S, (counts + BM - 1) // BM, 0)
    first = tl.sum(tl.where(experts < mine, blocks, 0))
    count = tl.sum(tl.where(experts == mine, counts, 0))
    last = first + tl.sum(tl.where(experts == mine, blocks, 0))
    if (mine >= E) & (mine < E + S):
        for start in range(0, BT if ONCE else T, BT):
            token = start + tl.arange(0, BT)
            tl.store(order + first * BM + token, token * (A + S) + A + mine - E, mask=token < T)
    else:
        before = first * BM
        for start in range(0, end, BP):
            pair = start + at
            is_mine = (_experts_of(ids, pair, T * A, E, S, BE) == mine) & (pair < T * A)
            place = before + tl.cumsum(is_mine.to(tl.int32), axis=0) - 1
            if SORTS:
                tl.store(order + place, (pair // A).to(order.dtype.element_ty), mask=is_mine)
                tl.store(places + pair, tl.where(mine < E, place, -1), mask=is_mine)
            else:
                tl.store(order + place, pair // A * (A + S) + pair % A, mask=is_mine)
            before += tl.sum(is_mine.to(tl.int32))
    if SORTS:
        tl.store(ends + mine, last, mask=mine < E)
    else:
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

    `ids` is [T, A]; the results are [blocks * rows] and [blocks] in int32, as long as they can get. Of blocks beyond
    the last only the expert is written.
    """
    T, A = ids.shape
    num_blocks = most_blocks(T * (A + shared_parts), num_experts + shared_parts + 1, rows)
    order = torch.empty(num_blocks * rows, dtype=torch.int32, device=ids.device)
    block_experts = torch.empty(num_blocks, dtype=torch.int32, device=ids.device)
    _launch(ids, order, block_experts, order, order, num_blocks, num_experts, shared_parts, rows, sorts=False)
    return order, block_experts


def sort(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of all pairs in the order of their experts; each pair's place in it; where each expert's pairs end.

    `ids` is [T, A] in int32, as are the places and the ends [E]; the tokens [T A] are an index. Pairs that route
    nowhere come last, and their place is -1.
    """
    tokens, places = torch.empty(ids.numel(), dtype=torch.int64, device=ids.device), torch.empty_like(ids)
    ends = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    _launch(ids, tokens, tokens, places, ends, 0, num_experts, 0, 1, sorts=True)
    return tokens, places, ends


def _launch(
    ids: Tensor,
    order: Tensor,
    block_experts: Tensor,
    places: Tensor,
    ends: Tensor,
    num_blocks: int,
    E: int,
    S: int,
    rows: int,
    sorts: bool,
) -> None:
    T, A = ids.shape
    is_once = T * A <= _IN_ONE_PIECE
    pairs = power_of_two(T * A) if is_once else _A_PIECE
    _align[(E + S + 1,)](
        ids, order, block_experts, places, ends, T, num_blocks, A=A, S=S, E=E, BE=power_of_two(E + S + 2), BM=rows,
        BP=pairs, BT=power_of_two(-(-pairs // A)),  # no less than T at once, and one for each BP
        ONCE=is_once, SORTS=sorts, num_warps=4 if pairs <= 4096 else 8,
    )  # fmt: skip


def most_blocks(num_pairs: int, num_experts: int, rows: int) -> int:
    """How many blocks there can be: one that is not full for every expert, and the full ones."""
    return min(num_pairs, num_experts) + num_pairs // rows
