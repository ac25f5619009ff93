"""The experts of one token, chosen by the kernel that first reads them and summed by the one that reads them last.

Gate and up are `experts.py`'s, whose programs choose their expert by the router's scores. Down is a kernel of its own:
a program has some columns of the result and the whole depth of all slots, each thread some of it, so that the sum over
slots, and with the stream, is made where it is. What a slot adds is not rounded in between.

Bytes moved: 3 N I for each of A + S slots, of 8 or 16 bit; at N = 2560, I = 1536, eight slots of 8 bit: 94 MB. The
hidden rows, 2 I (A + S), once for each program, from the L2 cache.
Source: own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels.triton.experts import (
    HIDDEN_SCALE,
    Weights,
    launch_down,
    launch_gate_up,
    sizes_of,
    tiles_of,
)
from ernie_serve.kernels.triton.launching import UPCAST
from ernie_serve.kernels.triton.linear import format_of, parts_of
from ernie_serve.kernels.triton.widening import as_float

# N hidden size, E experts of width I, A active experts, S parts of the shared MLP

_WAYS = {"plain": (4, 256, 8), "row": (4, 512, 2)}
"""Columns of the result, depth of a tile, warps: what is on its way stays in registers. As measured on an H200."""
_MOST_TILES = 48
"""To a program, one after the other: the compiler takes seconds for each further ten."""


@triton.jit
def _sum_down(hidden, weights, ids, weight, scales, shared, shared_scales, stream, out, A: tl.constexpr,
              S: tl.constexpr, E: tl.constexpr, N: tl.constexpr, I: tl.constexpr, FORMAT: tl.constexpr,
              HALF: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    at = tl.arange(0, BK)
    # x in the shape of a tile: each thread loads what it multiplies, and threads exchange nothing
    every = at[None, :] + tl.zeros((BN, 1), tl.int32)
    total = tl.zeros((BN, BK), tl.float32)
    for slot in tl.static_range(A + S):
        if slot < A:
            expert = tl.load(ids + slot)
            factor = tl.load(weights + slot).to(tl.float32)
            factor = tl.where(expert < 0, 0.0, factor)  # a pair that routes nowhere
            expert = tl.maximum(expert, 0).to(tl.int64)
            start = weight + (expert * N + column)[:, None] * I
            scale = scales + expert * N + column
        else:
            factor = 1.0
            start = shared + column.to(tl.int64)[:, None] * (S * I) + (slot - A) * I
            scale = shared_scales + column
        part = tl.zeros((BN, BK), tl.float32)
        for k in tl.static_range(0, I, BK):
            w = tl.load(start + k + at[None, :])
            x = tl.load(hidden + slot * I + k + every).to(tl.float32)
            part += as_float(w, FORMAT, UPCAST) * x
        if FORMAT == "row":
            total += part * (tl.load(scale) * factor)[:, None]
        else:
            total += part * factor
    y = tl.sum(total, axis=1)
    if HALF:
        y *= 1.0 / HIDDEN_SCALE
    y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(stream + column).to(tl.float32)
    tl.store(out + column, y.to(out.dtype.element_ty))


def suits(down: Weights, top_k: int, shared: tuple[Weights, Weights] | None) -> bool:
    """Whether `down` [E, N, I] is in whole tiles, so few that all can be written out; int4 is left to `experts.py`."""
    _, N, width = down.shape
    if format_of(down) == "int4":
        return True
    depth = top_k * width + (0 if shared is None else shared[1].shape[1])
    columns, tile, _ = _way(format_of(down), width)
    return N % columns == 0 and width % 16 == 0 and depth // tile <= _MOST_TILES


def experts_of_one(
    x: Tensor,
    scores: Tensor,
    bias: Tensor,
    top_k: int,
    norm_min: float,
    gate_up: Weights,
    down: Weights,
    shared: tuple[Weights, Weights] | None,
    stream: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """`stream` [1, N] with all that the experts of `x` [1, N] add; of int4, which is yet to be added, as a second.

    The first kernel chooses the experts by the router's `scores` [1, E].
    """
    first, second = tiles_of(x, gate_up)
    sizes = sizes_of(1, top_k, down, shared, x)
    ids = torch.empty((1, top_k), dtype=torch.int32, device=x.device)
    weights = torch.empty((1, top_k), dtype=stream.dtype, device=x.device)
    blocks = (ids, ids, ids)
    hidden = launch_gate_up(x, blocks, gate_up, shared, sizes, first, scored=(scores, bias, norm_min, weights))
    if format_of(down) == "int4":
        return stream, launch_down(hidden, weights, blocks, down, shared, sizes, second)
    return sum_down(hidden, weights, ids, down, shared, sizes, stream), None


def sum_down(
    hidden: Tensor,
    weights: Tensor,
    ids: Tensor,
    down: Weights,
    shared: tuple[Weights, Weights] | None,
    sizes: dict[str, int],
    stream: Tensor,
) -> Tensor:
    """`stream` [1, N], and the sum of what the slots of `hidden` [A + S, I] add."""
    out = torch.empty_like(stream)
    columns, depth, warps = _way(format_of(down), sizes["I"])
    told = {name: sizes[name] for name in ("A", "S", "E", "N", "I", "HALF")}
    _sum_down[(sizes["N"] // columns,)](
        hidden, weights, ids, *parts_of(down), *parts_of(shared[1] if shared else down), stream, out, **told,
        FORMAT=format_of(down), BN=columns, BK=depth, UPCAST=UPCAST, num_warps=warps,
    )  # fmt: skip
    return out


def _way(format: str, width: int) -> tuple[int, int, int]:
    """Columns, depth and warps, so that rows of `width` are whole tiles."""
    columns, depth, warps = _WAYS[format]
    return columns, min(depth, width & -width), warps
