"""A matrix times one row, with what comes before and behind it: the decode step of a single stream.

A kernel that reads a matrix for one row takes some 2.5 us more than its bytes do, whatever it does. So norms, rotary,
the cache's write, the experts' sum and that with the stream have no kernels of their own here. A program has some rows
of the matrix and all of their depth; its threads ask for all of that at once, before they norm x, each for itself.

Bytes moved: the matrix, M N of 8 bits or 2 M N; x, the norm's weight and what is added once for each program, from the
L2 cache.
Source: own; that RMSNorm can be computed again by whoever reads its input is what "megakernels" do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels import kv_format
from ernie_serve.kernels.quantized import Quantized
from ernie_serve.kernels.triton.launching import UPCAST, power_of_two
from ernie_serve.kernels.triton.linear import format_of, parts_of
from ernie_serve.kernels.triton.rope import cache_format, write_heads
from ernie_serve.kernels.triton.widening import as_float

# M rows of a matrix, N numbers of each and of x, H query heads, K key/value heads, D head size, E experts of width I,
# A active experts, S parts of the shared MLP

_MOST_DEPTH = 3072
_MOST_MATRIX_ROWS = 16384
_ROWS = 4
_WARPS = 2
"""Rows of the matrix to a program, and its warps, as measured on an H200 with `scripts/gpu_check --parts ways`."""


@triton.jit
def _rounded(x, to):
    """float32 that has been rounded as what `to` points at."""
    return x.to(to.dtype.element_ty).to(tl.float32)


@triton.jit
def _one_row(x, norm, eps, weight, scales, out, added, rotary, k_cache, v_cache, slots, normed, N: tl.constexpr,
             FIRST: tl.constexpr, REST: tl.constexpr, BN: tl.constexpr, FORMAT: tl.constexpr, THEN: tl.constexpr,
             HAS_NORM: tl.constexpr, SHARE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
             WIDTH: tl.constexpr, CACHE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    first = tl.program_id(0) * BN
    row = first + tl.arange(0, BN)
    start = row.to(tl.int64)[:, None] * N
    a = tl.arange(0, FIRST)
    b = FIRST + tl.arange(0, REST)
    w = tl.load(weight + start + a[None, :])
    if N > FIRST:
        w_rest = tl.load(weight + start + b[None, :], mask=(b < N)[None, :], other=0.0)
    tl.debug_barrier()  # or the compiler asks for x first, and waits for it before it asks for the matrix
    x_first = tl.load(x + a).to(tl.float32)
    if N > FIRST:
        x_rest = tl.load(x + b, mask=b < N, other=0.0).to(tl.float32)
    if FORMAT == "row":
        factor = tl.load(scales + row)
    if THEN == "turn":
        slot = tl.load(slots, eviction_policy="evict_last")
    if HAS_NORM:
        norm_first = tl.load(norm + a, eviction_policy="evict_last").to(tl.float32)
        total = tl.sum(x_first * x_first)
        if N > FIRST:
            norm_rest = tl.load(norm + b, mask=b < N, other=0.0, eviction_policy="evict_last").to(tl.float32)
            total += tl.sum(x_rest * x_rest)
        scale = tl.rsqrt(total / N + eps)
        x_first = _rounded(norm_first * _rounded(x_first * scale, x), x)
        if N > FIRST:
            x_rest = _rounded(norm_rest * _rounded(x_rest * scale, x), x)
    if SHARE > 0:
        part = tl.program_id(0)
        tl.store(normed + a, x_first.to(normed.dtype.element_ty), mask=a // SHARE == part)
        if N > FIRST:
            tl.store(normed + b, x_rest.to(normed.dtype.element_ty), mask=(b // SHARE == part) & (b < N))
    y = tl.sum(as_float(w, FORMAT, UPCAST) * x_first[None, :], axis=1)
    if N > FIRST:
        y += tl.sum(as_float(w_rest, FORMAT, UPCAST) * x_rest[None, :], axis=1)
    if FORMAT == "row":
        y *= factor
    if THEN == "turn":
        pair = first % D // 2 + tl.arange(0, BN // 2)[None, :]
        head = first // D
        even, odd = tl.split(tl.reshape(_rounded(y, x), (1, BN // 2, 2)))
        if head < H + K:
            cos = tl.load(rotary + 2 * pair)
            sin = tl.load(rotary + 2 * pair + 1)
            turned = even * cos - odd * sin
            odd = _rounded(odd * cos + even * sin, x)
            even = _rounded(turned, x)
        if head < H:
            query = out + head * D + 2 * pair
            tl.store(query, even.to(out.dtype.element_ty))
            tl.store(query + 1, odd.to(out.dtype.element_ty))
        else:
            keeps = pair < tl.where(slot >= 0, D // 2, 0)
            place = (slot * K + (head - H) % K) * WIDTH
            if head < H + K:
                write_heads(k_cache + place, even, odd, pair, keeps, D, CACHE)
            else:
                write_heads(v_cache + place, even, odd, pair, keeps, D, CACHE)
    else:
        if THEN == "add":
            y = _rounded(y, x) + tl.load(added + row).to(tl.float32)
        tl.store(out + row, y.to(out.dtype.element_ty))


def suits(x: Tensor, weight: Tensor | Quantized, rows: int | None = None) -> bool:
    """Whether these are one row and a matrix of which a program's threads can ask for `rows` at once."""
    M, N = weight.shape
    matrix = weight.data if isinstance(weight, Quantized) else weight
    return (
        len(x) == 1
        and 16 <= N <= _MOST_DEPTH
        and M <= _MOST_MATRIX_ROWS
        and M % (rows or _ROWS) == 0
        and N % 16 == 0
        and (x.dtype == torch.bfloat16 or UPCAST)
        and (format_of(weight) == "row" or matrix.dtype in (x.dtype, torch.float32))
        and x.is_contiguous()
        and matrix.is_contiguous()
    )


def _launch(
    x: Tensor,
    weight: Tensor | Quantized,
    out: Tensor,
    then: str,
    rows: int | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    added: Tensor | None = None,
    normed: Tensor | None = None,
    rotary: Tensor | None = None,
    caches: tuple[Tensor, Tensor] | None = None,
    slots: Tensor | None = None,
    num_heads: int = 0,
) -> None:
    M, N = weight.shape
    rows = rows or _ROWS
    first = 1 << (N.bit_length() - 1)
    k_cache, v_cache = caches or (x, x)
    _one_row[(M // rows,)](
        x, x if norm is None else norm, eps, *parts_of(weight), out, x if added is None else added,
        x if rotary is None else rotary, k_cache, v_cache, x if slots is None else slots,
        x if normed is None else normed, N=N, FIRST=first, REST=power_of_two(N - first), BN=rows,
        FORMAT=format_of(weight), THEN=then, HAS_NORM=norm is not None,
        SHARE=0 if normed is None else triton.cdiv(N, M // rows), H=num_heads,
        K=k_cache.shape[2] if caches else 1, D=kv_format.head_dim(k_cache) if caches else 2,
        WIDTH=k_cache.shape[3] if caches else 0, CACHE=cache_format(k_cache), UPCAST=UPCAST, num_warps=_WARPS,
    )  # fmt: skip


def linear(x: Tensor, weight: Tensor | Quantized, norm: Tensor | None, eps: float) -> Tensor:
    """`x` [1, N], normed where there is a `norm` [N], by `weight` [M, N]: [1, M]."""
    out = torch.empty((1, weight.shape[0]), dtype=x.dtype, device=x.device)
    _launch(x, weight, out, "nothing", norm=norm, eps=eps)
    return out


def add_linear(stream: Tensor, x: Tensor, weight: Tensor | Quantized) -> Tensor:
    """`stream` [1, M] and `x` [1, N] by `weight` [M, N], which is rounded first."""
    out = torch.empty_like(stream)
    _launch(x, weight, out, "add", added=stream)
    return out


def turns(k_cache: Tensor) -> bool:
    """Whether `linear_and_turn` writes such a cache: a scale of 8 bits is of a whole head, which no program has."""
    D = kv_format.head_dim(k_cache)
    return cache_format(k_cache) != "int8" and D % _ROWS == 0


def linear_and_turn(
    x: Tensor,
    weight: Tensor | Quantized,
    norm: Tensor | None,
    eps: float,
    rotary: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    num_heads: int,
) -> Tensor:
    """The queries [1, H, D] of `x`, turned; keys and values are in the cache, unless the slot is below 0.

    As `linear` and `rope.rope_and_write`.
    """
    q = torch.empty((1, num_heads, kv_format.head_dim(k_cache)), dtype=x.dtype, device=x.device)
    _launch(
        x, weight, q, "turn", norm=norm, eps=eps, rotary=rotary, caches=(k_cache, v_cache), slots=slots,
        num_heads=num_heads,
    )  # fmt: skip
    return q


def scores(x: Tensor, weight: Tensor, norm: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The router's scores [1, E] in float32 of `x` [1, N], normed where there is a `norm`, and that in `dtype`."""
    found = torch.empty((1, len(weight)), dtype=torch.float32, device=x.device)
    normed = torch.empty_like(x, dtype=dtype)
    _launch(x, weight, found, "nothing", 1, norm, eps, normed=normed)  # a program a score: few are they
    return found, normed
