"""A dense matrix times some rows, and one of 8 bits made wide: the projections of attention, a dense MLP, the head.

A program has some rows of the matrix, which lie in one piece, and all of its depth: nothing has to be joined. Of 8 bits
what a tile reads is widened to x's own dtype, which holds it exactly, and a row's scale multiplies the sum.

Bytes moved, 16 bit: 2 M N (8 bit: M N), and 2 T N for each program, from the L2 cache. At M = 3584, N = 2560: 18.4 MB.
Source: own. Above some tens of rows, or of great depth, cuBLAS is as fast, and is used; for a matrix of 8 bits that
is made wide first, from some hundreds on, where that costs less than it saves.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels.quantized import Quantized
from ernie_serve.kernels.triton.launching import UPCAST, dot, has_large_tiles, power_of_two
from ernie_serve.kernels.triton.widening import bytes_as_bfloat

# T rows, N numbers of each, M rows of the matrix

_MOST_ROWS = 16
_MOST_DEPTH = 8192
_MOST_ROWS_OF_8_BITS = 256
_FOR_FEW = (32, 512, 2, 4)
_FOR_MANY = (64, 256, 4, 5)
"""Rows of the matrix, depth, warps and stages of a program, as measured on an H200."""
_OF_8_BITS = (32, 512, 4, 4)
_OF_8_BITS_ON_SMALL = (32, 256, 4, 3)
_OF_8_BITS_FOR_SOME = (32, 256, 4, 3)
_OF_8_BITS_FOR_MANY = (64, 128, 8, 3)
_OF_8_BITS_FOR_MORE_ON_SMALL = (64, 64, 8, 4)
"""For as many rows as are one tile, and the same on a card with 99 KiB for it: not measured. For 64 rows and for more,
as measured on an H200 at 64 and 256; and for both on a card with 99 KiB, not measured."""


@triton.jit(do_not_specialize=["T"])
def _linear(x, weight, scales, out, T, M, N: tl.constexpr, FORMAT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            BK: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BN
    column = first + tl.arange(0, BN)
    column_ok = column < M
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    row_ok = row < T
    acc = tl.zeros((BM, BN), tl.float32)
    if FORMAT == "row":  # asked for before the loop, so that none is waited for behind it
        factor = tl.load(scales + column, mask=column_ok, other=0.0)
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
        if FORMAT == "row" and x.dtype.element_ty == tl.bfloat16 and not UPCAST:
            w = bytes_as_bfloat(w)
        acc = dot(values, w, acc, UPCAST)
    if FORMAT == "row":
        acc *= factor[None, :]
    place = out + row.to(tl.int64)[:, None] * M + column[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


def suits(x: Tensor, weight: Tensor | Quantized) -> bool:
    """Whether `linear` takes these; it wants rows side by side, in 16 bit, whose ends are aligned.

    A plain matrix is left to cuBLAS on a card that has no room for its tiles.
    """
    (T, N), (M, _) = x.shape, weight.shape
    if isinstance(weight, Quantized):
        is_known = format_of(weight) == "row" and T <= _MOST_ROWS_OF_8_BITS
    else:
        is_known = has_large_tiles(x.device) and T <= _MOST_ROWS and N <= _MOST_DEPTH and weight.dtype == x.dtype
    matrix = weight.data if isinstance(weight, Quantized) else weight
    return (
        is_known
        and T > 0
        and (x.dtype == torch.bfloat16 or UPCAST)
        and N % 16 == 0
        and M % 16 == 0
        and x.is_contiguous()
        and matrix.is_contiguous()
    )


def linear(x: Tensor, weight: Tensor | Quantized, way: tuple[int, int, int, int] | None = None) -> Tensor:
    """`x` [T, N] by `weight` [M, N]: [T, M]. `way` is columns, depth, warps and stages."""
    (T, N), (M, _) = x.shape, weight.shape
    columns, depth, warps, stages = way or _way(T, M, isinstance(weight, Quantized), has_large_tiles(x.device))
    rows = min(128, max(16, power_of_two(T)))
    out = torch.empty((T, M), dtype=x.dtype, device=x.device)
    _linear[(triton.cdiv(M, columns), triton.cdiv(T, rows))](
        x, *parts_of(weight), out, T, M, N=N, FORMAT=format_of(weight), BM=rows, BN=columns,
        BK=max(16, min(depth, power_of_two(N))), UPCAST=UPCAST, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _way(T: int, M: int, is_quantized: bool, has_room: bool) -> tuple[int, int, int, int]:
    if not is_quantized:
        return _FOR_MANY if M >= 16384 else _FOR_FEW
    if T > _MOST_ROWS:
        large = _OF_8_BITS_FOR_SOME if T <= 64 else _OF_8_BITS_FOR_MANY
        return large if has_room else _OF_8_BITS_FOR_MORE_ON_SMALL
    return _OF_8_BITS if has_room else _OF_8_BITS_ON_SMALL


@triton.jit
def _widen(data, scales, out, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    numbers = tl.load(data + row * N + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scales + row)
    tl.store(out + row * N + at, numbers.to(out.dtype.element_ty), mask=inside)


def widened(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """The numbers of a matrix [M, N] of 8 bits in `dtype`, in one pass: M N (1 + bytes of `dtype`)."""
    M, N = weight.shape
    out = torch.empty((M, N), dtype=dtype, device=weight.data.device)
    block = min(4096, power_of_two(N))
    _widen[(M, triton.cdiv(N, block))](weight.data, weight.scales, out, N, BLOCK=block, num_warps=4)
    return out


def format_of(weight: Tensor | Quantized) -> str:
    """How a kernel reads these weights: "plain", with a scale a "row", or "int4"."""
    if isinstance(weight, Tensor):
        return "plain"
    return "int4" if weight.format == "int4" else "row"


def parts_of(weight: Tensor | Quantized) -> tuple[Tensor, Tensor]:
    """The numbers and the scales; of a plain matrix itself twice, where a kernel reads no scales."""
    return (weight, weight) if isinstance(weight, Tensor) else (weight.data, weight.scales)
