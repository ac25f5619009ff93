"""What surrounds a prompt's grouped GEMMs: SwiGLU of many rows, and each token's sum of what its experts gave.

Both read once and write once, where plain torch makes a pass for each operation.

`swiglu`, bytes moved in 16 bit: 6 W a row. `combine`: 2 N (A + 2) a token; for 8,192 tokens of 6 experts and N = 2560
that is 336 MB.
Source: own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels.triton.launching import power_of_two

# T tokens, N hidden size, A active experts, M rows, W width


@triton.jit
def _swiglu(gate_up, out, end, W, HAS_END: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < W
    if HAS_END:
        inside = at < tl.where(row < tl.load(end), W, 0)
    gate = tl.load(gate_up + row * 2 * W + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * W + W + at, mask=inside, other=0.0).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * W + at, (active * up).to(out.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor, end: Tensor | None = None) -> Tensor:
    """silu(gate) * up of rows [M, 2 W], gate first: [M, W]. Rows from `end` [1] on are left as they are."""
    M, width = gate_up.shape
    out = torch.empty((M, width // 2), dtype=gate_up.dtype, device=gate_up.device)
    block = min(2048, power_of_two(width // 2))
    _swiglu[(M, triton.cdiv(width // 2, block))](
        gate_up, out, gate_up if end is None else end, width // 2, HAS_END=end is not None, BLOCK=block, num_warps=4
    )
    return out


@triton.jit
def _combine(rows, places, weights, base, out, N, A: tl.constexpr, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    total = tl.zeros((BLOCK,), tl.float32)
    for a in tl.static_range(A):
        place = tl.load(places + token * A + a).to(tl.int64)
        weight = tl.load(weights + token * A + a).to(tl.float32)
        row = tl.load(rows + place * N + at, mask=at < tl.where(place >= 0, N, 0), other=0.0).to(tl.float32)
        total += row * weight
    if HAS_BASE:
        total += tl.load(base + token * N + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * N + at, total.to(out.dtype.element_ty), mask=inside)


def combine(rows: Tensor, places: Tensor, weights: Tensor, base: Tensor | None) -> Tensor:
    """`base` [T, N] plus each token's `rows` [M, N] at `places` [T, A] (below 0 for none) times `weights`."""
    (T, A), N = places.shape, rows.shape[1]
    out = torch.empty((T, N), dtype=rows.dtype, device=rows.device)
    block = min(1024, power_of_two(N))
    _combine[(T, triton.cdiv(N, block))](
        rows, places, weights, rows if base is None else base, out, N, A=A, HAS_BASE=base is not None, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return out
