"""RMSNorm, with what is pending added to the stream first.

One program a row of N numbers. What is pending may be several rows, [T, P, N]: the outputs of a token's experts, which
are summed here in the order of their slots rather than by a kernel of its own.

Bytes moved, 16 bit: T N (1 + P) read, 2 T N written. At N = 2560, P = 8: 0.06 MB for one row, 3.6 MB for 64.
Source: own; the fusion is the one every server has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_serve.kernels.triton.launching import power_of_two

# T rows, N hidden size, P pending rows of each


@triton.jit
def _add_rms_norm(residual, delta, weight, summed, out, eps, P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < N
    x = tl.load(residual + row * N + at, mask=inside, other=0.0).to(tl.float32)
    if P > 0:
        pending = tl.zeros((BLOCK,), tl.float32)
        for p in tl.static_range(P):
            pending += tl.load(delta + (row * P + p) * N + at, mask=inside, other=0.0).to(tl.float32)
        # rounded once on its way into the stream, and once more as the stream
        pending = pending.to(residual.dtype.element_ty).to(tl.float32)
        stream = (x + pending).to(residual.dtype.element_ty)
        tl.store(summed + row * N + at, stream, mask=inside)
        x = stream.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / N + eps)
    w = tl.load(weight + at, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    normed = (x * scale).to(residual.dtype.element_ty).to(tl.float32)
    tl.store(out + row * N + at, (w * normed).to(out.dtype.element_ty), mask=inside)


def add_rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`residual` [T, N] plus `delta` [T, N] or [T, P, N], and the norm of that."""
    T, N = residual.shape
    P = 0 if delta is None else delta.shape[1] if delta.dim() == 3 else 1
    summed = residual if delta is None else torch.empty_like(residual)
    out = torch.empty_like(residual)
    if not T:  # a step that only reads a piece of a prompt wants no logits; a launch of nothing is an error
        return residual, out
    block = power_of_two(N)
    _add_rms_norm[(T,)](
        residual,
        residual if delta is None else delta,
        weight,
        summed,
        out,
        eps,
        P=P,
        N=N,
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )
    return summed, out
