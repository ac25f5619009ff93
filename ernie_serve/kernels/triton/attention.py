"""Decode attention over the paged cache: one query a request, its context split between programs.

A program has one request, one key/value head with its group of query heads (5, filled up to 16 rows for the tensor
cores), and one of SPLITS equal parts of the context, in steps of 64 tokens whose blocks it looks up. It leaves a sum
of its own and the logarithm of its weight, to base 2; a second kernel joins the parts. With one split it writes the
result itself.

Where a step of 64 tokens lies in one block, as in blocks of 64, its address is one number, fetched a step ahead. e4m3
is multiplied in half precision, int8 in bfloat16. The tensor cores want values turned, and no instruction turns single
bytes on their way from shared memory; so two of a row are read as one number of 16 bits, and taken apart where they are
widened, into a sum of the even columns and one of the odd ones.

Bytes moved: 2 K D a token of context and request, times the cache's bytes: 2,048 B in 16 bit at K = 4, D = 128, so
269 MB a layer for 64 requests of 2,048; beside it 4 H (D + 1) SPLITS a request of parts.
Source: own; splitting the context is what Flash-Decoding describes.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels import kv_format
from ernie_serve.kernels.triton.launching import UPCAST, num_processors, power_of_two
from ernie_serve.kernels.triton.rope import cache_format
from ernie_serve.kernels.triton.widening import bytes_as_bfloat, pairs_apart

# R requests, H query heads, K key/value heads, G = H / K, D head size, B blocks of PAGE tokens

SPLITS = (1, 4, 16, 64)
_STEP = 64


@triton.jit
def _scales(cache, at, ok, D: tl.constexpr, FORMAT: tl.constexpr):
    """The scale of each of the rows at offsets `at` [n]; 0 where it is not ok."""
    if FORMAT == "int8":
        return tl.load((cache + at + D).to(tl.pointer_type(tl.float32)), mask=ok, other=0.0)
    return tl.where(ok, 1.0, 0.0)


@triton.jit(do_not_specialize=["table_width"])
def _attend(q, k_cache, v_cache, tables, lens, out, parts, logs, table_width, scale, SPLITS: tl.constexpr,
            H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
            PAGE: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, FORMAT: tl.constexpr,
            HALF: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lens + request, eviction_policy="evict_last")
    share = (length + SPLITS * STEP - 1) // (SPLITS * STEP) * STEP
    start = split * share
    stop = tl.minimum(start + share, length)
    g = tl.arange(0, BG)
    d = tl.arange(0, BD)
    mask = (g < G)[:, None] & (d < D)[None, :]
    at = (request * H + head * G + g)[:, None] * D + d[None, :]
    queries = tl.load(q + at, mask=mask, other=0.0)
    TO: tl.constexpr = tl.float32 if UPCAST else tl.float16 if HALF else q.dtype.element_ty  # what is multiplied
    if HALF:
        queries = (queries.to(tl.float32) * scale).to(tl.float16)  # smaller, so that it fits
        scale = 1.0
    best = tl.zeros((BG,), tl.float32) - 1e30
    totals = tl.zeros((BG, STEP), tl.float32)  # of each place in a step, so that warps need not meet for it
    IN_PAIRS: tl.constexpr = FORMAT != "plain"
    acc = tl.zeros((BG, BD // 2 if IN_PAIRS else BD), tl.float32)
    odd = acc
    IN_ONE_BLOCK: tl.constexpr = PAGE % STEP == 0  # all of a step
    table = tables + request * table_width
    block = tl.load(table + start // PAGE, mask=start < stop, other=0, eviction_policy="evict_last")
    step = tl.arange(0, STEP)
    for first in range(start, stop, STEP):
        ok = first + step < stop
        if IN_ONE_BLOCK:
            inside = 0 if PAGE == STEP else first % PAGE
            base = ((block.to(tl.int64) * PAGE + inside) * K + head) * WIDTH
            row = step * (K * WIDTH)
            following = tl.minimum(first + STEP, stop - 1) // PAGE
            block = tl.load(table + following, eviction_policy="evict_last")  # of the next step
        else:
            blocks = tl.load(table + (first + step) // PAGE, mask=ok, other=0).to(tl.int64)
            base = head * WIDTH
            row = (blocks * PAGE + (first + step) % PAGE) * (K * WIDTH)
        # beyond the context is room of the last block: what lies there may be no number, and is let go of below
        keys = tl.load(k_cache + base + (row[:, None] + d[None, :]), mask=None if D == BD else (d < D)[None, :])
        if FORMAT == "int8":
            keys = keys.to(tl.int8, bitcast=True)
            if tl.bfloat16 == TO:
                keys = bytes_as_bfloat(keys)
        scores = tl.dot(queries.to(TO), tl.trans(keys.to(TO)), input_precision="ieee")
        key_scales = _scales(k_cache + base, row, ok, D, FORMAT)
        scores = tl.where(ok[None, :], scores * (key_scales * scale)[None, :], -1e30)
        newest = tl.maximum(best, tl.max(scores, axis=1))
        shares = tl.where(ok[None, :], tl.exp2(scores - newest[:, None]), 0.0)
        keep = tl.exp2(best - newest)
        totals = totals * keep[:, None] + shares
        best = newest
        acc *= keep[:, None]
        if IN_PAIRS:
            odd *= keep[:, None]
            shares = shares * _scales(v_cache + base, row, ok, D, FORMAT)[None, :]
            pair = tl.arange(0, BD // 2)
            pairs = tl.load(
                (v_cache + base).to(tl.pointer_type(tl.int16)) + ((row // 2)[:, None] + pair[None, :]),
                mask=ok[:, None] & (pair < D // 2)[None, :], other=0,
            )  # fmt: skip
            even_values, odd_values = pairs_apart(pairs, FORMAT, TO)
            acc = tl.dot(shares.to(TO), even_values.to(TO), acc=acc, input_precision="ieee")
            odd = tl.dot(shares.to(TO), odd_values.to(TO), acc=odd, input_precision="ieee")
        else:
            values = tl.load(
                v_cache + base + (row[:, None] + d[None, :]), mask=ok[:, None] & (d < D)[None, :], other=0.0
            )
            acc = tl.dot(shares.to(TO), values.to(TO), acc=acc, input_precision="ieee")
    if IN_PAIRS:
        acc = tl.interleave(acc, odd)
    total = tl.sum(totals, axis=1)
    if SPLITS == 1:
        tl.store(out + at, (acc / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        if start < length:  # the second kernel reads no part that begins beyond the context
            place = (request * H + head * G + g) * SPLITS + split
            tl.store(parts + place[:, None] * D + d[None, :], acc / total[:, None], mask=mask)
            tl.store(logs + place, best + tl.log2(total), mask=g < G)


@triton.jit
def _join(parts, logs, lens, out, SPLITS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
          STEP: tl.constexpr):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    row = request * H + tl.program_id(1)
    length = tl.load(lens + request, eviction_policy="evict_last")
    share = (length + SPLITS * STEP - 1) // (SPLITS * STEP) * STEP
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, BD)
    ok = split * share < length
    log = tl.load(logs + row * SPLITS + split, mask=ok, other=-1e30)
    weight = tl.where(ok, tl.exp2(log - tl.max(log)), 0.0)
    part = tl.load(
        parts + (row * SPLITS + split)[:, None] * D + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0
    )
    joined = tl.sum(part * weight[:, None], axis=0) / tl.maximum(tl.sum(weight), 1e-30)
    tl.store(out + row * D + d, joined.to(out.dtype.element_ty), mask=d < D)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, splits: int
) -> Tensor:
    """Attention of `q` [R, H, D], request r over the first `context_lens[r]` tokens in its blocks: [R, H D].

    A request of no length, which only a padded row has, gets zeros.
    """
    R, H, D = q.shape
    K = k_cache.shape[2]
    out = torch.empty((R, H * D), dtype=q.dtype, device=q.device)
    parts = torch.empty((R, H, splits, D) if splits > 1 else (1,), dtype=torch.float32, device=q.device)
    logs = torch.empty((R, H, splits) if splits > 1 else (1,), dtype=torch.float32, device=q.device)
    bd = max(16, power_of_two(D))
    size = k_cache.dtype.itemsize
    few = R * K * splits <= 2 * num_processors(q.device)
    # few programs, or small numbers, want more steps under way in each; of 32 bits no card of 99 KiB has room for them
    stages = 2 + (few and size < 4) + (size == 1)
    if k_cache.shape[1] % _STEP:
        stages += 2  # blocks are looked up on the way
    _attend[(R, K, splits)](
        q, k_cache, v_cache, block_tables, context_lens, out, parts, logs, block_tables.stride(0),
        D**-0.5 * math.log2(math.e),
        SPLITS=splits, H=H, K=K, G=H // K, D=D, BG=max(16, power_of_two(H // K)), BD=bd, PAGE=k_cache.shape[1],
        WIDTH=kv_format.width(D, torch.int8) if k_cache.dtype == torch.uint8 else D, STEP=_STEP,
        FORMAT=cache_format(k_cache),
        HALF=cache_format(k_cache) == "fp8" and q.dtype != torch.float32, UPCAST=UPCAST, num_warps=4, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _join[(R, H)](parts, logs, context_lens, out, SPLITS=splits, H=H, D=D, BD=bd, STEP=_STEP, num_warps=2)
    return out


def splits_for(num_requests: int, num_kv_heads: int, longest: int, device: torch.device) -> int:
    """Into how many parts contexts are split: programs for nearly two on each processor, none of less than a step.

    However many requests there are, a long context is split, so that one program does not keep the others waiting.
    """
    wanted = max(-(-19 * num_processors(device) // (10 * num_requests * num_kv_heads)), -(-longest // 8192))
    most = max(1, -(-longest // _STEP))
    return next((splits for splits in SPLITS if splits >= min(wanted, most)), SPLITS[-1])
