"""Interleaved rotary of queries and keys, and keys and values to their slots in the cache.

One program a token and up to four heads. A slot below 0 is a padded row: its query is turned, nothing is written.
The cache is as `kv_format` says: 16 or 32 bit, fp8 (e4m3, no scale), or int8 with a float32 scale behind each row.

Bytes moved, 16 bit: T (H + 2K) D read and written. At H = 20, K = 4, D = 128: 14 KB a token.
Source: own.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels import kv_format

# T tokens, H query heads, K key/value heads, D head size


@triton.jit
def _rope_and_write(qkv, rotary, k_cache, v_cache, slots, q_out, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
                    HALF: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, FORMAT: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS  # all of a program's heads are of one kind
    heads = first + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    real = (pair < D // 2)[None, :]
    slot = tl.load(slots + token, eviction_policy="evict_last")  # asked for now, so that nothing waits for it later
    at = ((token * (H + 2 * K) + heads) * D)[:, None] + 2 * pair[None, :]
    even = tl.load(qkv + at, mask=real, other=0.0).to(tl.float32)
    odd = tl.load(qkv + at + 1, mask=real, other=0.0).to(tl.float32)
    if first < H + K:
        cos = tl.load(rotary + token * D + 2 * pair, mask=pair < D // 2, other=1.0)[None, :]
        sin = tl.load(rotary + token * D + 2 * pair + 1, mask=pair < D // 2, other=0.0)[None, :]
        turned = even * cos - odd * sin
        odd = odd * cos + even * sin
        even = turned
    if first < H:
        out = q_out + ((token * H + heads) * D)[:, None] + 2 * pair[None, :]
        tl.store(out, even.to(q_out.dtype.element_ty), mask=real)
        tl.store(out + 1, odd.to(q_out.dtype.element_ty), mask=real)
    else:
        keeps = (pair < tl.where(slot >= 0, D // 2, 0))[None, :]
        # what the cache holds has been rounded to the network's dtype first, as a wider cache would hold it
        even = even.to(qkv.dtype.element_ty).to(tl.float32)
        odd = odd.to(qkv.dtype.element_ty).to(tl.float32)
        row = ((slot * K + (heads - H) % K) * WIDTH)[:, None]
        if first < H + K:
            write_heads(k_cache + row, even, odd, pair[None, :], keeps, D, FORMAT)
        else:
            write_heads(v_cache + row, even, odd, pair[None, :], keeps, D, FORMAT)


@triton.jit
def write_heads(out, even, odd, pair, keeps, D: tl.constexpr, FORMAT: tl.constexpr):
    """Rows of heads [HEADS, D / 2] to where `out` [HEADS, 1] says."""
    if FORMAT == "int8":
        largest = tl.maximum(tl.max(tl.abs(even), axis=1), tl.max(tl.abs(odd), axis=1))[:, None]
        scale = tl.div_rn(largest, 127.0)
        inside = tl.where(scale > 0, scale, 1.0)
        tl.store(out + 2 * pair, _rounded(tl.div_rn(even, inside)).to(tl.uint8, bitcast=True), mask=keeps)
        tl.store(out + 2 * pair + 1, _rounded(tl.div_rn(odd, inside)).to(tl.uint8, bitcast=True), mask=keeps)
        place = (out + D).to(tl.pointer_type(tl.float32)) + pair
        tl.store(place, tl.zeros_like(even) + scale, mask=keeps & (pair == 0))
    else:
        if FORMAT == "fp8":
            even = _as_fp8(even)
            odd = _as_fp8(odd)
        tl.store(out + 2 * pair, even.to(out.dtype.element_ty), mask=keeps)
        tl.store(out + 2 * pair + 1, odd.to(out.dtype.element_ty), mask=keeps)


@triton.jit
def _as_fp8(x):
    """The nearest number that e4m3 holds: three bits behind the first, steps of 2^-9 near zero, at most 448.

    The conversion after it then has nothing to round, which the interpreter's does not carry into the exponent.
    """
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    near_zero = (x + 24576.0) - 24576.0
    return tl.where(tl.abs(x) < 0.015625, near_zero, bits.to(tl.float32, bitcast=True))


@triton.jit
def _rounded(x):
    """To the nearest integer, halves to the even one: adding 1.5 * 2^23 leaves no room for a fraction."""
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)


def rope_and_write(
    qkv: Tensor, rotary: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, num_heads: int
) -> Tensor:
    """The queries [T, H, D], turned; keys and values of `qkv` [T, (H + 2K) D] are in the cache."""
    T = qkv.shape[0]
    K, D = k_cache.shape[2], kv_format.head_dim(k_cache)
    q = torch.empty((T, num_heads, D), dtype=qkv.dtype, device=qkv.device)
    heads = math.gcd(num_heads, K, 4)
    _rope_and_write[(T, (num_heads + 2 * K) // heads)](
        qkv,
        rotary,
        k_cache,
        v_cache,
        slots,
        q,
        H=num_heads,
        K=K,
        D=D,
        HALF=triton.next_power_of_2(D // 2),
        HEADS=heads,
        WIDTH=k_cache.shape[3],
        FORMAT=cache_format(k_cache),
        num_warps=1,
    )
    return q


def cache_format(cache: Tensor) -> str:
    """How a kernel reads and writes rows of this cache."""
    return {torch.uint8: "int8", torch.float8_e4m3fn: "fp8"}.get(cache.dtype, "plain")
