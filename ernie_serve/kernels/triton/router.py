"""The router: float32 scores, softmax, a choice with the bias, weights without it.

Two kernels. The first splits the hidden size into pieces, because few programs would read all of the router's weight
alone: partial scores [P, T, E]. It multiplies on the tensor cores and is as exact as float32: of 16 bits, x is what it
is, and a weight of 24 bits is the sum of three numbers of 8. The second, one program a token, sums the pieces in order,
takes the softmax and chooses A times the largest biased probability, the lower id of equals. Rows from `num_live` on
are padding and go to expert -1.

Of a single stream others make the scores (`one_row.py`) and call `choice` (`experts.py`). Of more rows the first kernel
reads all of x once, so it also writes it in half precision for quantized experts, where that is asked.

Bytes moved: 4 E N read once for every 16 rows (64 of a prompt), 8 P T E between the two. At E = 64, N = 2560: 0.66 MB.
Source: own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels.triton.launching import UPCAST, power_of_two

# T tokens, N hidden size, E experts, A active experts, P pieces of N

_PIECES = (20, 10, 5, 2, 1)
_PROGRAMS = 80


@triton.jit(do_not_specialize=["T"])
def _scores(x, weight, partial, half, T, N: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr,
            PIECE: tl.constexpr, BK: tl.constexpr, HAS_HALF: tl.constexpr, IN_THREE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    piece = tl.program_id(1)
    expert = tl.arange(0, BE)
    acc = tl.zeros((BM, BE), tl.float32)
    for k in range(piece * PIECE, (piece + 1) * PIECE, BK):
        at = k + tl.arange(0, BK)
        place = row.to(tl.int64)[:, None] * N + at[None, :]
        inside = (row < T)[:, None] & (at < N)[None, :]
        a = tl.load(x + place, mask=inside, other=0.0)
        if HAS_HALF:
            tl.store(half + place, a.to(tl.float16), mask=inside)
        b = tl.load(
            weight + expert[None, :] * N + at[:, None], mask=(expert < E)[None, :] & (at < N)[:, None], other=0.0
        )
        if IN_THREE:
            high = b.to(tl.bfloat16)
            rest = b - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(a, low, acc=acc)
            acc = tl.dot(a, middle, acc=acc)
            acc = tl.dot(a, high, acc=acc)
        else:
            acc += tl.dot(a.to(tl.float32), b, input_precision="ieee")
    out = partial + (piece.to(tl.int64) * T + row[:, None]) * E + expert[None, :]
    tl.store(out, acc, mask=(row < T)[:, None] & (expert < E)[None, :])


@triton.jit
def choice(scores, bias, A: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BA: tl.constexpr):
    """Ids [W, BA] of the experts that each row of scores [W, BE] chooses, and all shares; beyond E it is -inf."""
    expert = tl.arange(0, BE)[None, :] + tl.zeros((scores.shape[0], 1), tl.int32)
    real = expert < E
    shares = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    shares = shares / tl.sum(shares, axis=1)[:, None]
    biased = shares + tl.load(bias + expert, mask=real, other=0.0, eviction_policy="evict_last")
    # as integers of the same order, whose maximum over a warp is one instruction
    bits = biased.to(tl.int32, bitcast=True)
    left = tl.where(real, bits ^ ((bits >> 31) & 0x7FFFFFFF), -(2**31))
    slot = tl.arange(0, BA)[None, :]
    ids = tl.zeros((scores.shape[0], BA), tl.int32) - 1
    for a in tl.static_range(A):
        best = tl.min(tl.where(left == tl.max(left, axis=1)[:, None], expert, BE), axis=1)[:, None]
        ids = tl.where(slot == a, best, ids)
        left = tl.where(expert == best, -(2**31), left)
    return ids, shares


@triton.jit
def chances(shares, ids, norm_min, BE: tl.constexpr):
    """What the experts `ids` [W, BA] weigh: their `shares` [W, BE] over those of all of them."""
    is_it = tl.arange(0, BE)[None, None, :] == ids[:, :, None]
    chosen = tl.sum(tl.where(is_it, shares[:, None, :], 0.0), axis=2)
    return chosen / tl.maximum(tl.sum(chosen, axis=1), norm_min)[:, None]


@triton.jit(do_not_specialize=["T"])
def _choose(partial, bias, num_live, weights, ids, T, norm_min, P: tl.constexpr, E: tl.constexpr, A: tl.constexpr,
            BE: tl.constexpr, BA: tl.constexpr, IS_PADDED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BE)[None, :]
    real = expert < E
    scores = tl.zeros((1, BE), tl.float32)
    for p in tl.static_range(P):
        scores += tl.load(partial + (p * T + row) * E + expert, mask=real, other=0.0)
    chosen, shares = choice(tl.where(real, scores, float("-inf")), bias, A, E, BE, BA)
    weighed = chances(shares, chosen, norm_min, BE)
    slot = tl.arange(0, BA)[None, :]
    if IS_PADDED:
        chosen = tl.where(row < tl.load(num_live, eviction_policy="evict_last"), chosen, -1)
    tl.store(weights + row * A + slot, weighed.to(weights.dtype.element_ty), mask=slot < A)
    tl.store(ids + row * A + slot, chosen, mask=slot < A)


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    norm_min: float,
    num_live: Tensor | None = None,
    half: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights in x's dtype and ids in int32 of the experts of `x` [T, N], both [T, A]; `half` [T, N] becomes x."""
    (T, N), E = x.shape, weight.shape[0]
    rows = 16 if T <= 256 or x.dtype == torch.float32 else 64  # of 32 bits 64 rows would not fit every card
    tiles = -(-T // rows)
    P = next((n for n in reversed(_PIECES) if n * tiles >= _PROGRAMS), _PIECES[0])
    bk = min(128, power_of_two(N))
    piece = -(-N // (P * bk)) * bk
    P = -(-N // piece)
    partial = torch.empty((P, T, E), dtype=torch.float32, device=x.device)
    be = max(16, power_of_two(E))
    _scores[(tiles, P)](
        x, weight, partial, x if half is None else half, T, N=N, E=E, BE=be, BM=rows, PIECE=piece, BK=bk,
        HAS_HALF=half is not None, IN_THREE=x.dtype == torch.bfloat16 and not UPCAST, num_warps=4,
    )  # fmt: skip
    weights = torch.empty((T, top_k), dtype=x.dtype, device=x.device)
    ids = torch.empty((T, top_k), dtype=torch.int32, device=x.device)
    _choose[(T,)](
        partial,
        bias,
        bias if num_live is None else num_live,
        weights,
        ids,
        T,
        norm_min,
        P=P,
        E=E,
        A=top_k,
        BE=be,
        BA=power_of_two(top_k),
        IS_PADDED=num_live is not None,
        num_warps=1,
    )
    return weights, ids
