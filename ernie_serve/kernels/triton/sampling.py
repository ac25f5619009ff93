"""The next token of each row on the device, without a sort, and the same one as `worker/sampler.py` chooses.

Chance is one number u a token, from the host. It picks from the cumulative distribution in the order of token ids, so
nothing has to be sorted to use it; top-k and top-p need only the score at which they end. Scores are counted and
weighed by how far they lie below the largest, in bins of 2. Those of the bin in which top-p ends, or of all up to the
one in which top-k does, some tens where a model knows what it says, are put together and searched digit by digit: as
the bits of a float, their depths order like whole numbers, and each of eight passes finds four bits of the last one
that is kept. Of equal scores the lower ids are kept, as a stable sort would.

Six kernels: the largest score of each piece of a row; its bins; what is to be searched; the search; the mass of each
piece; the piece, and in it the token, where the running sum passes u. The second to the fourth are at once over for
rows without top-k and top-p.

Bytes moved: the logits twice, and twice more for a row with limits, then from the L2 cache.
Source: own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels.triton.launching import power_of_two

# R rows, V token ids, P pieces of BLOCK ids

_BLOCK = 1024
_BINS = 8
_SEARCHED = 512  # keys at a time


@triton.jit
def _depth(logits, row, stride, at, V, largest, temperature):
    """How far scores lie below the largest, over the temperature: 0 and more; infinite beyond the vocabulary.

    Beyond 80 a chance is none; `sampler.py` cuts at 78, which no choice can tell apart.
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
def _is_limited(settings, top_ks, row, V):
    """Whether chance decides a row, and top-k or top-p is to leave fewer than all."""
    top_k = tl.load(top_ks + row)
    limited = ((top_k > 0) & (top_k < V)) | (tl.load(settings + row * 4 + 2) < 1.0)
    return limited & (tl.load(settings + row * 4 + 1).to(tl.float32) > 0)


@triton.jit
def _bin(depth, BINS: tl.constexpr):
    """Bins of a depth of 2, and all beyond in the last one."""
    return tl.minimum(depth * 0.5, BINS - 1).to(tl.int32)


@triton.jit
def _coarse(logits, stride, peaks, settings, top_ks, bin_counts, bin_masses, V, P, BP: tl.constexpr,
            BLOCK: tl.constexpr, BINS: tl.constexpr):  # fmt: skip
    """How many scores of a piece each bin has, and what they weigh."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    if _is_limited(settings, top_ks, row, V):
        temperature = tl.load(settings + row * 4 + 1).to(tl.float32)
        min_p = tl.load(settings + row * 4 + 3).to(tl.float32)
        at = piece * BLOCK + tl.arange(0, BLOCK)
        depth = _depth(logits, row, stride, at, V, _largest(peaks, row, P, BP), temperature)
        bin = tl.arange(0, BINS)
        here = (_bin(depth, BINS)[None, :] == bin[:, None]) & (at < V)[None, :]
        place = (row * P + piece) * BINS + bin
        tl.store(bin_counts + place, tl.sum(here.to(tl.int32), axis=1))
        tl.store(bin_masses + place, tl.sum(tl.where(here, _weight(depth, min_p)[None, :], 0.0), axis=1))


@triton.jit
def _reach(values, target, N: tl.constexpr):
    """Where the running sum of `values` [N] reaches `target`, and the sum before that."""
    at = tl.arange(0, N)
    reached = tl.min(tl.where((tl.cumsum(values, axis=0) >= target) & (values > 0), at, N))
    reached = tl.minimum(reached, tl.max(tl.where(values > 0, at, 0)))  # rounding may leave it just beyond all there is
    return reached, tl.sum(tl.where(at < reached, values, 0.0))


@triton.jit
def _first_end(bin_counts, bin_masses, row, P, top_k, has_k, top_p, BP: tl.constexpr, BINS: tl.constexpr):
    """Where the first limit of a row ends: how many keys of each piece are to be searched [BP, BINS], what the bins
    before them weigh, which bins they are (of top-k all to its end, for top-p ends among them), and the target."""
    piece = tl.arange(0, BP)
    bin = tl.arange(0, BINS)
    place = (row * P + piece)[:, None] * BINS + bin[None, :]
    counts = tl.load(bin_counts + place, mask=(piece < P)[:, None], other=0)
    if has_k:
        values = tl.sum(counts, axis=0).to(tl.float64)
        target = top_k.to(tl.float64)
    else:
        masses = tl.load(bin_masses + place, mask=(piece < P)[:, None], other=0.0)
        values = tl.sum(masses.to(tl.float64), axis=0)
        target = top_p * tl.sum(values)
    end, before = _reach(values, target, BINS)
    first = tl.where(has_k, 0, end)
    before = tl.where(has_k, 0.0, before)
    return tl.where(((bin >= first) & (bin <= end))[None, :], counts, 0), before, first, end, target


@triton.jit
def _collect(logits, stride, peaks, settings, top_ks, bin_counts, bin_masses, scratch, V, P, BP: tl.constexpr,
             BLOCK: tl.constexpr, BINS: tl.constexpr):  # fmt: skip
    """The keys of a piece that are to be searched, behind those of the pieces before."""
    row = tl.program_id(0).to(tl.int64)
    mine = tl.program_id(1)
    if _is_limited(settings, top_ks, row, V):
        temperature = tl.load(settings + row * 4 + 1).to(tl.float32)
        top_k = tl.load(top_ks + row)
        counts, _, first, end, _ = _first_end(bin_counts, bin_masses, row, P, top_k, (top_k > 0) & (top_k < V),
                                              tl.load(settings + row * 4 + 2), BP, BINS)  # fmt: skip
        piece = tl.arange(0, BP)[:, None]
        if tl.sum(tl.where(piece == mine, counts, 0)) > 0:
            start = tl.sum(tl.where(piece < mine, counts, 0))
            at = mine * BLOCK + tl.arange(0, BLOCK)
            depth = _depth(logits, row, stride, at, V, _largest(peaks, row, P, BP), temperature)
            bin = _bin(depth, BINS)
            here = (bin >= first) & (bin <= end) & (at < V)
            place = scratch + row * V + start + tl.cumsum(here.to(tl.int32), axis=0) - 1
            tl.store(place, depth.to(tl.int32, bitcast=True), mask=here)


@triton.jit
def _search(keys, num, min_p, target, by_mass: tl.constexpr, BLOCK: tl.constexpr):
    """The key at which the running sum of the first `num`, least depth first, reaches `target`; the sum before it."""
    digit = tl.arange(0, 16)
    found = tl.full((), 0, tl.int32)
    before = tl.full((), 0.0, tl.float64)
    for level in range(8):
        shift = 28 - 4 * level
        sums = tl.zeros((16, BLOCK), tl.float32)
        for first in range(0, num, BLOCK):
            at = first + tl.arange(0, BLOCK)
            key = tl.load(keys + at, mask=at < num, other=0)
            value = _weight(key.to(tl.float32, bitcast=True), min_p) if by_mass else tl.full((BLOCK,), 1.0, tl.float32)
            fits = (((key ^ found) >> shift) >> 4 == 0) & (at < num)  # the digits before are those found
            mine = (((key >> shift) & 15)[None, :] == digit[:, None]) & fits[None, :]
            sums += tl.where(mine, value[None, :], 0.0)
        reached, less = _reach(tl.sum(sums.to(tl.float64), axis=1), target - before, 16)
        before += less
        found += reached << shift
    return found, before


@triton.jit
def _limit(settings, top_ks, bin_counts, bin_masses, scratch, keys, equals, V, P, BP: tl.constexpr,
           BINS: tl.constexpr, SEARCHED: tl.constexpr):  # fmt: skip
    """The key where a row's top-k and top-p end, and how many of those that have it are kept."""
    row = tl.program_id(0).to(tl.int64)
    key = tl.full((), 2147483647, tl.int32)
    kept = tl.full((), 2147483647, tl.int32)
    if _is_limited(settings, top_ks, row, V):
        top_k = tl.load(top_ks + row)
        top_p = tl.load(settings + row * 4 + 2)
        min_p = tl.load(settings + row * 4 + 3).to(tl.float32)
        has_k = (top_k > 0) & (top_k < V)
        counts, before, _, _, target = _first_end(bin_counts, bin_masses, row, P, top_k, has_k, top_p, BP, BINS)
        num = tl.sum(counts)
        mine = scratch + row * V
        if has_k:
            key, inside = _search(mine, num, min_p, target, False, SEARCHED)
            kept = (target - inside).to(tl.int32)
            sums = tl.zeros((SEARCHED,), tl.float32)
            for first in range(0, num, SEARCHED):
                at = first + tl.arange(0, SEARCHED)
                other = tl.load(mine + at, mask=at < num, other=2147483647)
                sums += tl.where(other < key, _weight(other.to(tl.float32, bitcast=True), min_p), 0.0)
            each = _weight(key.to(tl.float32, bitcast=True), min_p).to(tl.float64)
            target = top_p * (tl.sum(sums.to(tl.float64)) + kept.to(tl.float64) * each)
        if top_p < 1.0:
            other, inside = _search(mine, num, min_p, target - before, True, SEARCHED)
            each = _weight(other.to(tl.float32, bitcast=True), min_p).to(tl.float64)
            needed = tl.where(each > 0, tl.ceil((target - before - inside) / tl.where(each > 0, each, 1.0)), 1.0)
            needed = tl.maximum(tl.minimum(needed, 2147483647.0), 1.0).to(tl.int32)
            kept = tl.where(other < key, needed, tl.where(other == key, tl.minimum(needed, kept), kept))
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
    bin_counts, bin_masses = (
        torch.empty((R, P, _BINS), dtype=dtype, device=device) for dtype in (torch.int32, torch.float32)
    )
    scratch = torch.empty((R, num_valid_ids), dtype=torch.int32, device=device)
    out = torch.empty(R, dtype=torch.int64, device=device)
    stride = logits.stride(0)
    _peaks[(R, P)](logits, stride, peaks, places, **sizes)
    limits = (logits, stride, peaks, settings, top_ks, bin_counts, bin_masses)
    _coarse[(R, P)](*limits, **wide, BINS=_BINS)
    _collect[(R, P)](*limits, scratch, **wide, BINS=_BINS)
    _limit[(R,)](settings, top_ks, bin_counts, bin_masses, scratch, keys, equals, num_valid_ids, P, BP=wide["BP"],
                 BINS=_BINS, SEARCHED=_SEARCHED, num_warps=8)  # fmt: skip
    _masses[(R, P)](logits, stride, peaks, settings, keys, masses, counts, **wide)
    _pick[(R,)](logits, stride, peaks, places, settings, keys, equals, masses, counts, out, **wide)
    return out
