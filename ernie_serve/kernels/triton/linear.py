"""A dense matrix times a few rows: the projections of attention and the head, for small batches.

A program has some rows of the matrix, which lie in one piece, and all of its depth: nothing has to be joined.

Bytes moved, 16 bit: 2 M N, and 2 T N for each program, from the L2 cache. At M = 3584, N = 2560: 18.4 MB.
Source: own. Above some tens of rows, or of great depth, cuBLAS is as fast, and is used.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels.triton.launching import UPCAST, dot, has_large_tiles, power_of_two

# T rows, N numbers of each, M rows of the matrix

_MOST_ROWS = 16
_MOST_DEPTH = 8192
_FOR_FEW = (32, 512, 2, 4)
_FOR_MANY = (64, 256, 4, 5)
"""Rows of the matrix, depth, warps and stages of a program, as measured on an H200."""


@triton.jit(do_not_specialize=["T"])
def _linear(x, weight, out, T, M, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
            UPCAST: tl.constexpr):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BN
    column = first + tl.arange(0, BN)
    column_ok = column < M
    row = tl.arange(0, BM)
    row_ok = row < T
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, N, BK):
        at = k + tl.arange(0, BK)
        if N % BK == 0:
            w = tl.load(weight + (column * N)[None, :] + at[:, None], mask=column_ok[None, :], other=0.0)
            values = tl.load(x + (row * N)[:, None] + at[None, :], mask=row_ok[:, None], other=0.0)
        else:
            inside = at < N
            w = tl.load(
                weight + (column * N)[None, :] + at[:, None], mask=column_ok[None, :] & inside[:, None], other=0.0
            )
            values = tl.load(x + (row * N)[:, None] + at[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
        acc = dot(values, w, acc, UPCAST)
    place = out + row.to(tl.int64)[:, None] * M + column[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes these; it wants rows side by side, in 16 bit, whose ends are aligned, and a large card."""
    (T, N), M = x.shape, len(weight)
    return (
        has_large_tiles(x.device)
        and 0 < T <= _MOST_ROWS
        and N <= _MOST_DEPTH
        and (x.dtype == weight.dtype == torch.bfloat16 or UPCAST)
        and N % 16 == 0
        and M % 16 == 0
        and x.is_contiguous()
        and weight.is_contiguous()
    )


def linear(x: Tensor, weight: Tensor, way: tuple[int, int, int, int] | None = None) -> Tensor:
    """`x` [T, N] by `weight` [M, N]: [T, M]. `way` is columns, depth, warps and stages."""
    (T, N), M = x.shape, len(weight)
    columns, depth, warps, stages = way or (_FOR_MANY if M >= 16384 else _FOR_FEW)
    out = torch.empty((T, M), dtype=x.dtype, device=x.device)
    _linear[(triton.cdiv(M, columns),)](
        x, weight, out, T, M, N=N, BM=max(16, power_of_two(T)), BN=columns, BK=max(16, min(depth, power_of_two(N))),
        UPCAST=UPCAST, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
