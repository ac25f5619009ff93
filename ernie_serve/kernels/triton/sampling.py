"""The next token of each row on the device, without a sort, and the same one as `worker/sampler.py` chooses.

Chance is one number u a token, from the host. It picks from the cumulative distribution in the order of token ids, so
nothing has to be sorted to use it; top-k and top-p need only the score at which they end, which is searched digit by
digit: scores below the largest, as the bits of a float, order like whole numbers, and each of eight passes over a row
finds four bits of the last one that is kept. Of equal scores the lower ids are kept, as a stable sort would.

Four kernels: the largest score of each piece of a row; the search, at once over for rows without top-k and top-p; the
mass of each piece; the piece, and in it the token, where the running sum passes u.

Bytes moved: the logits twice, and nine to seventeen times for a row with limits, then from the L2 cache.
Source: own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels.triton.launching import power_of_two

# R rows, V token ids, P pieces of BLOCK ids

_BLOCK = 1024


@triton.jit
def _depth(logits, row, stride, at, V, largest, temperature):
    """How far scores lie below the largest, over the temperature: 0 and more; infinite beyond the vocabulary.

    Beyond 80 a chance is none; that is where `sampler.py` cuts, too.
    """
    scores = tl.load(logits + row * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
    depth = tl.div_rn(largest - scores, temperature)
    return tl.where(depth < 80.0, depth, float("inf"))


@triton.jit
def _weight(depth, min_p):
    """The chance of each before it is divided by the sum."""
    weight = tl.where(depth < 80.0, tl.exp(-depth), 0.0)
    return tl.where(weight >= min_p, weight, 0.0)


@triton.jit
def _peaks(logits, stride, peaks, places, V, P, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    at = piece * BLOCK + tl.arange(0, BLOCK)
    scores = tl.load(logits + row * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
    best = tl.max(scores)
    tl.store(peaks + row * P + piece, best)
    tl.store(places + row * P + piece, tl.min(tl.where((scores == best) & (at < V), at, V - 1)))


@triton.jit
def _largest(peaks, row, P, BP: tl.constexpr):
    piece = tl.arange(0, BP)
    return tl.max(tl.load(peaks + row * P + piece, mask=piece < P, other=float("-inf")))


@triton.jit
def _search(logits, row, stride, V, largest, temperature, min_p, target, by_mass: tl.constexpr, BLOCK: tl.constexpr):
    """The key at which the running sum, likeliest first, reaches `target`; the sum before it, and what equals weigh."""
    digit = tl.arange(0, 16)
    found = tl.full((), 0, tl.int32)
    before = tl.full((), 0.0, tl.float64)
    inside = tl.full((), 0.0, tl.float64)
    for level in tl.static_range(8):
        shift = 28 - 4 * level
        sums = tl.zeros((16, BLOCK), tl.float32)
        for first in range(0, V, BLOCK):
            at = first + tl.arange(0, BLOCK)
            depth = _depth(logits, row, stride, at, V, largest, temperature)
            key = depth.to(tl.int32, bitcast=True)
            if by_mass:
                value = _weight(depth, min_p)
            else:
                value = tl.where(at < V, 1.0, 0.0)
            if level > 0:
                value = tl.where((key >> (shift + 4)) == (found >> (shift + 4)), value, 0.0)
            sums += tl.where(((key >> shift) & 15)[None, :] == digit[:, None], value[None, :], 0.0)
        mass = tl.sum(sums.to(tl.float64), axis=1)
        running = before + tl.cumsum(mass, axis=0)
        reached = tl.min(tl.where((running >= target) & (mass > 0), digit, 16))
        last = tl.max(tl.where(mass > 0, digit, 0))
        reached = tl.minimum(reached, last)  # rounding may leave the target just beyond all there is
        before += tl.sum(tl.where(digit < reached, mass, 0.0))
        inside = tl.sum(tl.where(digit == reached, mass, 0.0))
        found += reached.to(tl.int32) << shift
    return found, before, inside


@triton.jit
def _limit(logits, stride, peaks, settings, top_ks, keys, equals, V, P, BP: tl.constexpr, BLOCK: tl.constexpr):
    """The key where a row's top-k and top-p end, and how many of those that have it are kept."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(settings + row * 4 + 1).to(tl.float32)
    top_p = tl.load(settings + row * 4 + 2)
    min_p = tl.load(settings + row * 4 + 3).to(tl.float32)
    top_k = tl.load(top_ks + row).to(tl.int32)
    has_k = (top_k > 0) & (top_k < V)
    has_p = top_p < 1.0
    key = tl.full((), 2147483647, tl.int32)
    kept = tl.full((), 2147483647, tl.int32)
    if (temperature > 0) & (has_k | has_p):
        largest = _largest(peaks, row, P, BP)
        if has_k:
            key, before, _ = _search(logits, row, stride, V, largest, temperature, min_p, top_k.to(tl.float64), False,
                                     BLOCK)  # fmt: skip
            kept = top_k - before.to(tl.int32)
        if has_p:
            sums = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, V, BLOCK):
                depth = _depth(logits, row, stride, first + tl.arange(0, BLOCK), V, largest, temperature)
                weight = _weight(depth, min_p)
                sums += tl.where(depth.to(tl.int32, bitcast=True) < key, weight, 0.0)
            total = tl.sum(sums.to(tl.float64))
            if has_k:
                total += kept.to(tl.float64) * _weight(key.to(tl.float32, bitcast=True), min_p).to(tl.float64)
            target = top_p * total
            other, before, _ = _search(logits, row, stride, V, largest, temperature, min_p, target, True, BLOCK)
            each = _weight(other.to(tl.float32, bitcast=True), min_p).to(tl.float64)
            count = tl.where(each > 0, tl.ceil((target - before) / tl.where(each > 0, each, 1.0)), 1.0)
            count = tl.maximum(tl.minimum(count, 2147483647.0), 1.0).to(tl.int32)
            kept = tl.where(other < key, count, tl.where(other == key, tl.minimum(count, kept), kept))
            key = tl.minimum(other, key)
    tl.store(keys + row, key)
    tl.store(equals + row, kept)


@triton.jit
def _masses(logits, stride, peaks, settings, keys, masses, counts, V, P, BP: tl.constexpr, BLOCK: tl.constexpr):
    """What is above the limit in each piece, and how many are at it."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    temperature = tl.load(settings + row * 4 + 1).to(tl.float32)
    if temperature > 0:
        min_p = tl.load(settings + row * 4 + 3).to(tl.float32)
        largest = _largest(peaks, row, P, BP)
        at = piece * BLOCK + tl.arange(0, BLOCK)
        depth = _depth(logits, row, stride, at, V, largest, temperature)
        key = depth.to(tl.int32, bitcast=True)
        limit = tl.load(keys + row)
        weight = tl.where(key < limit, _weight(depth, min_p), 0.0)
        tl.store(masses + row * P + piece, tl.sum(weight.to(tl.float64)))
        tl.store(counts + row * P + piece, tl.sum(((key == limit) & (at < V)).to(tl.int32)))


@triton.jit
def _pick(logits, stride, peaks, places, settings, keys, equals, masses, counts, out, V, P, BP: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(settings + row * 4 + 1).to(tl.float32)
    piece = tl.arange(0, BP)
    real = piece < P
    peak = tl.load(peaks + row * P + piece, mask=real, other=float("-inf"))
    largest = tl.max(peak)
    place = tl.load(places + row * P + piece, mask=real, other=V - 1)
    chosen = tl.min(tl.where((peak == largest) & real, place, V - 1))
    if temperature > 0:
        point = tl.load(settings + row * 4)
        min_p = tl.load(settings + row * 4 + 3).to(tl.float32)
        limit = tl.load(keys + row)
        kept = tl.load(equals + row)
        each = _weight(limit.to(tl.float32, bitcast=True), min_p).to(tl.float64)
        mass = tl.load(masses + row * P + piece, mask=real, other=0.0)
        count = tl.load(counts + row * P + piece, mask=real, other=0)
        count_before = tl.cumsum(count, axis=0) - count
        its = tl.maximum(tl.minimum(kept - count_before, count), 0)
        # a limit nobody has set is not a number, and counts for nothing
        mass += tl.where(its > 0, its.to(tl.float64) * each, 0.0)
        running = tl.cumsum(mass, axis=0)
        total = tl.sum(mass)
        target = point * total
        last = tl.max(tl.where(mass > 0, piece, 0))
        where = tl.minimum(tl.min(tl.where((running > target) & (mass > 0), piece, BP)), last)
        start = tl.sum(tl.where(piece == where, running - mass, 0.0))
        equal_before = tl.sum(tl.where(piece == where, count_before, 0))
        at = where * BLOCK + tl.arange(0, BLOCK)
        depth = _depth(logits, row, stride, at, V, largest, temperature)
        key = depth.to(tl.int32, bitcast=True)
        is_equal = (key == limit) & (at < V)
        rank = equal_before + tl.cumsum(is_equal.to(tl.int32), axis=0)  # 1 for the first
        stays = (key < limit) | (is_equal & (rank <= kept))
        weight = tl.where(stays, _weight(depth, min_p), 0.0).to(tl.float64)
        running_here = start + tl.cumsum(weight, axis=0)
        last_here = tl.max(tl.where(weight > 0, at, 0))
        chosen = tl.minimum(tl.min(tl.where((running_here > target) & (weight > 0), at, V)), last_here)
    tl.store(out + row, chosen.to(tl.int64))


def sample(logits: Tensor, settings: Tensor, top_ks: Tensor, num_valid_ids: int) -> Tensor:
    """A token id for each row of `logits` [R, V], of the first `num_valid_ids`: [R] int64.

    `settings` [R, 4] in float64 are the point u in [0, 1), the temperature (0 is greedy), top_p (1 is off) and min_p;
    `top_ks` [R] in int32, 0 is off.
    """
    R, device = logits.shape[0], logits.device
    assert logits.stride(1) == 1, "a row's logits stand side by side"
    P = -(-num_valid_ids // _BLOCK)
    sizes = {"V": num_valid_ids, "P": P, "BLOCK": _BLOCK}
    wide = sizes | {"BP": power_of_two(P)}
    peaks = torch.empty((R, P), dtype=torch.float32, device=device)
    places, counts = (torch.empty((R, P), dtype=torch.int32, device=device) for _ in range(2))
    masses = torch.empty((R, P), dtype=torch.float64, device=device)
    keys, equals = (torch.empty(R, dtype=torch.int32, device=device) for _ in range(2))
    out = torch.empty(R, dtype=torch.int64, device=device)
    stride = logits.stride(0)
    _peaks[(R, P)](logits, stride, peaks, places, **sizes)
    _limit[(R,)](logits, stride, peaks, settings, top_ks, keys, equals, **wide, num_warps=16)
    _masses[(R, P)](logits, stride, peaks, settings, keys, masses, counts, **wide)
    _pick[(R,)](logits, stride, peaks, places, settings, keys, equals, masses, counts, out, **wide)
    return out
