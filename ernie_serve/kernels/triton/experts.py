"""The experts of a decode step: gate and up with SwiGLU, then down with the router's weight, the shared MLP included.

A program has one block of rows that all go to one expert, and one piece of that expert's columns. Two ways to a block:
- direct, up to 16 tokens: program p belongs to pair p, finds the tokens that share its expert, and leaves at once if an
  earlier pair has the same. Row t of the tile is token t. No expert is read twice, nothing has to be sorted. Of one
  token there is nothing to find, and gate and up may choose the experts by the router's scores (`experts_of_one.py`).
- aligned, above: blocks come from `align`.

The shared MLP [2 S I, N] and [N, S I] is S more experts of width I that every token takes with weight 1, read in place.
Outputs of a token's slots stay apart, [T, A + S, N]: no atomics, so that the same batch gives the same bits; the norm
that follows adds them. A pair that routes nowhere gets zeros.

Bytes moved: (distinct experts + S) times 3 N I weights, which is all that counts up to some hundred rows, and
2 (N + I) bytes a pair and kernel. At N = 2560, I = 1536, 16 bit: 23.6 MB an expert, 1.56 GB for 64 + 2 experts.
Source: own; the idea of block-aligned rows with both epilogues is that of the fused MoE kernels of vLLM and SGLang.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels.quantized import GROUP, Quantized
from ernie_serve.kernels.triton import align
from ernie_serve.kernels.triton.launching import UPCAST, dot, has_large_tiles, power_of_two
from ernie_serve.kernels.triton.linear import format_of, parts_of
from ernie_serve.kernels.triton.router import chances, choice
from ernie_serve.kernels.triton.tiles import Tile, tile_for
from ernie_serve.kernels.triton.widening import bytes_as_half, nibbles_as_half

# T tokens, N hidden size, E experts of width I, A active experts, S parts of the shared MLP,
# BM rows, BN columns and BK depth of a tile

MOST_DIRECT = 16
HIDDEN_SCALE = tl.constexpr(2.0**-6)
"""With quantized weights the arithmetic is in half precision, which ends at 65,504: what lies between the two matrices
is kept that much smaller, up to 4 million; what the norm before gives is smaller than the square root of N."""


@triton.jit
def _block(ids, order, block_experts, T, DIRECT: tl.constexpr, ONE: tl.constexpr, A: tl.constexpr, S: tl.constexpr,
           E: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """The expert of this program's block and the pair of each of its rows, -1 for none.

    The expert is E + S for pairs that route nowhere, and above that, or below 0, where there is nothing to do.
    """
    block = tl.program_id(0)
    row = tl.arange(0, BM)
    if ONE:
        expert = tl.load(ids + block, mask=block < A, other=0).to(tl.int32)
        expert = tl.where(block < A, tl.where(expert < 0, E + S, expert), E + block - A)
        pairs = tl.where(row == 0, block, -1)
    elif DIRECT:
        expert = tl.load(ids + block, mask=block < T * A, other=0).to(tl.int32)
        is_routed = block < T * A
        expert = tl.where(is_routed, tl.where(expert < 0, E + S, expert), E + block - T * A)
        pairs = tl.zeros((BM,), tl.int32) - 1
        for a in tl.static_range(A):
            found = tl.load(ids + row * A + a, mask=row < T, other=-1).to(tl.int32)
            pairs = tl.where((found == expert) & (row < T), row * (A + S) + a, pairs)
        own = block // A * (A + S) + block % A
        first = tl.min(tl.where(pairs >= 0, pairs, 2147483647))
        is_first = (first == own) | (expert >= E)
        shared = tl.where(row < T, row * (A + S) + A + expert - E, -1)
        pairs = tl.where(expert < E, pairs, tl.where(is_routed, tl.where(row == 0, own, -1), shared))
        expert = tl.where(is_first, expert, -1)
    else:
        expert = tl.load(block_experts + block)
        pairs = tl.load(order + block * BM + row)
    return expert, pairs


@triton.jit
def _times(acc, x, rows_ok, w, scales, columns_ok, k, K: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr,
           HALF: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """`acc` plus one step over the depth, from `k` on; rows are at pointers `x`, weights at `w`.

    Of int4, `scales` are those of this step's two groups, side by side as the halves of an int32.
    """
    if FORMAT == "int4":
        at = tl.arange(0, 64)
        packed = tl.load(w[None, :] + (k // 2 + at)[:, None], mask=columns_ok[None, :], other=0)
        x_low = tl.load(x[:, None] + (k + at)[None, :], mask=rows_ok[:, None], other=0.0)
        x_high = tl.load(x[:, None] + (k + 64 + at)[None, :], mask=rows_ok[:, None], other=0.0)
        if HALF:
            low, high = nibbles_as_half(packed, UPCAST)
            x_low = x_low.to(tl.float16)
            x_high = x_high.to(tl.float16)
        else:
            low = (packed & 15).to(tl.int8) - 8
            high = (packed >> 4).to(tl.int8) - 8
        nothing = tl.zeros_like(acc)
        acc += dot(x_low, low, nothing, UPCAST) * (scales << 16).to(tl.float32, bitcast=True)[None, :]
        acc += dot(x_high, high, nothing, UPCAST) * (scales & -65536).to(tl.float32, bitcast=True)[None, :]
    else:
        at = k + tl.arange(0, BK)
        if K % BK == 0:
            weights = tl.load(w[None, :] + at[:, None], mask=columns_ok[None, :], other=0.0)
            values = tl.load(x[:, None] + at[None, :], mask=rows_ok[:, None], other=0.0)
        else:
            weights = tl.load(w[None, :] + at[:, None], mask=columns_ok[None, :] & (at < K)[:, None], other=0.0)
            values = tl.load(x[:, None] + at[None, :], mask=rows_ok[:, None] & (at < K)[None, :], other=0.0)
        if HALF:
            weights = bytes_as_half(weights, UPCAST)
            values = values.to(tl.float16)
        acc = dot(values, weights, acc, UPCAST)
    return acc


@triton.jit
def _pair_of_scales(scales, row, ok, k, GROUPS: tl.constexpr, FORMAT: tl.constexpr):
    """Of int4, the scales of the 128 columns from `k` on of each row, as one int32; of other formats nothing."""
    if FORMAT == "int4":
        return tl.load(scales.to(tl.pointer_type(tl.int32)) + row * (GROUPS // 2) + k // 128, mask=ok, other=0)
    return tl.zeros_like(row).to(tl.int32)


@triton.jit
def _choose(scores, bias, norm_min, weights, ids, A: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
            BA: tl.constexpr, WARPS: tl.constexpr):  # fmt: skip
    """The expert of this program's slot of one token, by the router's scores; the first program tells all of them.

    Each warp chooses by itself, so that warps need not meet.
    """
    block = tl.program_id(0)
    expert = tl.arange(0, BE)[None, :] + tl.zeros((WARPS, 1), tl.int32)
    found, shares = choice(tl.load(scores + expert, mask=expert < E, other=float("-inf")), bias, A, E, BE, BA)
    slot = tl.arange(0, BA)
    if block + tl.program_id(1) == 0:
        tl.store(ids + slot, tl.max(found, axis=0), mask=slot < A)
        weighed = chances(shares, found, norm_min, BE)
        tl.store(weights + slot, tl.max(weighed, axis=0).to(weights.dtype.element_ty), mask=slot < A)
    return tl.max(tl.max(tl.where(slot[None, :] == block, found, -1), axis=1), axis=0)


@triton.jit(do_not_specialize=["T"])
def _gate_up(x, ids, order, block_experts, scores, bias, norm_min, weights, weight, scales, shared, shared_scales, out,
             T, CHOOSES: tl.constexpr, WARPS: tl.constexpr, BE: tl.constexpr, BA: tl.constexpr,
             DIRECT: tl.constexpr, ONE: tl.constexpr, A: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
             N: tl.constexpr, I: tl.constexpr, FORMAT: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr,
             BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    if CHOOSES:
        block = tl.program_id(0)
        expert = E + block - A
        if block < A:
            expert = _choose(scores, bias, norm_min, weights, ids, A, E, BE, BA, WARPS)
        pairs = tl.where(tl.arange(0, BM) == 0, block, -1)
    else:
        expert, pairs = _block(ids, order, block_experts, T, DIRECT, ONE, A, S, E, BM)
    if (expert >= 0) & (expert < E + S):
        W_N: tl.constexpr = N // 2 if FORMAT == "int4" else N
        GROUPS: tl.constexpr = N // 64 if FORMAT == "int4" else 1
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        column_ok = column < I
        row_ok = pairs >= 0
        token = tl.where(row_ok, pairs // (A + S), 0)
        rows = x + token.to(tl.int64) * N
        if expert < E:
            gate_row = expert.to(tl.int64) * (2 * I) + column
            up_row = gate_row + I
            base = weight
            scale_base = scales
        else:
            gate_row = (expert - E).to(tl.int64) * I + column
            up_row = gate_row + S * I
            base = shared
            scale_base = shared_scales
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        if FORMAT == "row":  # asked for before the loop, so that none is waited for behind it
            gate_factor = tl.load(scale_base + gate_row, mask=column_ok, other=0.0)
            up_factor = tl.load(scale_base + up_row, mask=column_ok, other=0.0)
        gate_scales = _pair_of_scales(scale_base, gate_row, column_ok, 0, GROUPS, FORMAT)
        up_scales = _pair_of_scales(scale_base, up_row, column_ok, 0, GROUPS, FORMAT)
        for k in range(0, N, BK):
            more = column_ok & (k + BK < N)  # scales of the next step, so that none is waited for
            next_gate = _pair_of_scales(scale_base, gate_row, more, k + BK, GROUPS, FORMAT)
            next_up = _pair_of_scales(scale_base, up_row, more, k + BK, GROUPS, FORMAT)
            gate = _times(gate, rows, row_ok, base + gate_row * W_N, gate_scales, column_ok, k, N, BK, FORMAT, HALF,
                          UPCAST)  # fmt: skip
            up = _times(up, rows, row_ok, base + up_row * W_N, up_scales, column_ok, k, N, BK, FORMAT, HALF, UPCAST)
            gate_scales = next_gate
            up_scales = next_up
        if FORMAT == "row":
            gate *= gate_factor[None, :]
            up *= up_factor[None, :]
        hidden = gate / (1.0 + tl.exp(-gate)) * up
        if HALF:
            hidden = tl.minimum(tl.maximum(hidden * HIDDEN_SCALE, -65504.0), 65504.0)
        place = out + pairs.to(tl.int64)[:, None] * I + column[None, :]
        tl.store(place, hidden.to(out.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit(do_not_specialize=["T"])
def _down(hidden, weights, ids, order, block_experts, weight, scales, shared, shared_scales, out, T,
          DIRECT: tl.constexpr, ONE: tl.constexpr, A: tl.constexpr, S: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
          I: tl.constexpr, FORMAT: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
          BK: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    expert, pairs = _block(ids, order, block_experts, T, DIRECT, ONE, A, S, E, BM)
    if (expert >= 0) & (expert <= E + S):
        W_I: tl.constexpr = I // 2 if FORMAT == "int4" else I
        GROUPS: tl.constexpr = I // 64 if FORMAT == "int4" else 1
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        column_ok = column < N
        row_ok = pairs >= 0
        acc = tl.zeros((BM, BN), tl.float32)
        factor = tl.zeros((BM,), tl.float32) + 1.0
        if expert < E + S:
            # rows are multiplied by their width after the branches, so that the compiler still knows they are aligned
            rows = hidden + tl.where(row_ok, pairs, 0).to(tl.int64) * I
            if expert < E:
                w_row = expert.to(tl.int64) * N + column
                scale_row = w_row
                base = weight
                scale_base = scales
                slot = pairs % (A + S)
                factor = tl.load(weights + pairs // (A + S) * A + slot, mask=row_ok, other=0.0).to(tl.float32)
            else:
                part = expert - E
                w_row = (column * S + part).to(tl.int64)
                scale_row = w_row
                if FORMAT == "row":
                    scale_row = column.to(tl.int64)  # one scale for the S parts of a row
                base = shared
                scale_base = shared_scales
            if FORMAT == "row":
                column_factor = tl.load(scale_base + scale_row, mask=column_ok, other=0.0)
            scales_here = _pair_of_scales(scale_base, scale_row, column_ok, 0, GROUPS, FORMAT)
            for k in range(0, I, BK):
                next_scales = _pair_of_scales(scale_base, scale_row, column_ok & (k + BK < I), k + BK, GROUPS, FORMAT)
                acc = _times(acc, rows, row_ok, base + w_row * W_I, scales_here, column_ok, k, I, BK, FORMAT, HALF,
                             UPCAST)  # fmt: skip
                scales_here = next_scales
            if FORMAT == "row":
                acc *= column_factor[None, :]
            if HALF:
                acc *= 1.0 / HIDDEN_SCALE
            acc = acc.to(out.dtype.element_ty).to(tl.float32) * factor[:, None]
        place = out + pairs.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


Weights = Tensor | Quantized


def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Weights,
    down: Weights,
    shared: tuple[Weights, Weights] | None,
    tiles: tuple[Tile, Tile] | None = None,
) -> Tensor:
    """What each slot of each token of `x` [T, N] adds, the shared MLP's parts last: [T, A + S, N].

    The result has the dtype of `weights`; `x` may be in half precision already where the matrices are quantized.
    `gate_up` is [E, 2I, N], `down` [E, N, I], `shared` one of each with a width of S I, all in one format.
    """
    first, second = tiles or tiles_of(x, gate_up)
    assert first.rows == second.rows, "both kernels read the same blocks"
    sizes = sizes_of(len(x), ids.shape[1], down, shared, x)
    order = block_experts = ids
    if not sizes["DIRECT"]:
        order, block_experts = align.align(ids, sizes["E"], sizes["S"], first.rows)
    blocks = (ids, order, block_experts)
    hidden = launch_gate_up(x, blocks, gate_up, shared, sizes, first)
    return launch_down(hidden, weights, blocks, down, shared, sizes, second)


def tiles_of(x: Tensor, gate_up: Weights) -> tuple[Tile, Tile]:
    """The tile of gate and up, and that of down."""
    known = len(x), format_of(gate_up), not has_large_tiles(x.device), x.dtype == torch.float32
    return tile_for("gate_up", *known), tile_for("down", *known)


def sizes_of(T: int, A: int, down: Weights, shared: tuple[Weights, Weights] | None, x: Tensor) -> dict[str, int]:
    """What the kernels know when they are compiled."""
    E, N, width = down.shape
    S = 0 if shared is None else shared[1].shape[1] // width
    half = format_of(down) != "plain" and x.dtype != torch.float32
    return {"DIRECT": T <= MOST_DIRECT, "ONE": T == 1, "A": A, "S": S, "E": E, "N": N, "I": width, "HALF": half}


def launch_gate_up(
    x: Tensor,
    blocks: tuple[Tensor, Tensor, Tensor],
    gate_up: Weights,
    shared: tuple[Weights, Weights] | None,
    sizes: dict[str, int],
    tile: Tile,
    scored: tuple[Tensor, Tensor, float, Tensor] | None = None,
) -> Tensor:
    """What lies between the matrices, [T (A + S), I].

    `blocks` are ids, order and the blocks' experts. With `scored`, the scores of one token, the bias, the least sum and
    where its weights go, ids and weights are written, not read.
    """
    T, width, slots = len(x), sizes["I"], sizes["A"] + sizes["S"]
    hidden = torch.empty((T * slots, width), dtype=torch.float16 if sizes["HALF"] else x.dtype, device=x.device)
    _gate_up[(_num_blocks(blocks, sizes), triton.cdiv(width, tile.columns))](
        x, *blocks, *(scored or (x, x, 0.0, x)), *parts_of(gate_up), *parts_of(shared[0] if shared else gate_up),
        hidden, T, CHOOSES=scored is not None, WARPS=tile.warps, BE=max(32, power_of_two(sizes["E"])),
        BA=power_of_two(sizes["A"]), **sizes, FORMAT=format_of(gate_up), UPCAST=UPCAST, **tile.options(sizes["N"]),
    )  # fmt: skip
    return hidden


def launch_down(
    hidden: Tensor,
    weights: Tensor,
    blocks: tuple[Tensor, Tensor, Tensor],
    down: Weights,
    shared: tuple[Weights, Weights] | None,
    sizes: dict[str, int],
    tile: Tile,
) -> Tensor:
    """What each slot adds, [T, A + S, N]."""
    N, slots = sizes["N"], sizes["A"] + sizes["S"]
    T = len(hidden) // slots
    out = torch.empty((T, slots, N), dtype=weights.dtype, device=hidden.device)
    _down[(_num_blocks(blocks, sizes), triton.cdiv(N, tile.columns))](
        hidden, weights, *blocks, *parts_of(down), *parts_of(shared[1] if shared else down), out, T, **sizes,
        FORMAT=format_of(down), UPCAST=UPCAST, **tile.options(sizes["I"]),
    )  # fmt: skip
    return out


def _num_blocks(blocks: tuple[Tensor, Tensor, Tensor], sizes: dict[str, int]) -> int:
    ids, _, block_experts = blocks
    return ids.numel() + sizes["S"] if sizes["DIRECT"] else len(block_experts)


assert GROUP == 64, "the kernels count on it"
