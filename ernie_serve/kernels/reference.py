"""Every verb of the network in plain torch: the meaning of correct.

Knows tensors and nothing else: no layers, no requests, no device. `cpu.py` and `cuda.py` subclass this and override
what they do better; every override is tested against the verb here on the same inputs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie_serve.kernels import kv_format, packed
from ernie_serve.kernels.layout import Layout
from ernie_serve.kernels.nibbles import Nibbles
from ernie_serve.kernels.packed import ROWS, Bits, Packed
from ernie_serve.kernels.panels import Panels
from ernie_serve.kernels.quantized import Quantized

Matrix = Tensor | Packed | Quantized | Panels | Nibbles
"""A matrix [out, in]."""

Matrices = Tensor | Packed | Quantized | Nibbles | Sequence[Tensor | Panels]
"""A stack of matrices [E, out, in], or each by itself."""

# T tokens, R requests, N hidden size, H query heads, K key/value heads, D head size,
# I MLP width, E experts, A active experts, L tokens of one request in the cache


class ReferenceKernels:
    """Plain torch on any device. Statistics, rotary, router and softmax run in float32, as the family was trained."""

    def empty_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [num_blocks, block_size, K, width], zeroed.

        `dtype` torch.int8 asks for 8 bits; `kv_format` says how wide a row is.
        """
        shape = (num_blocks, block_size, num_kv_heads, kv_format.width(head_dim, dtype))
        element = kv_format.element(dtype)
        return torch.zeros(shape, dtype=element, device=device), torch.zeros(shape, dtype=element, device=device)

    def packs(self, dtype: torch.dtype) -> bool:
        """Whether matrices of this dtype have an order that `linear` and `experts` read faster than the plain one."""
        return False

    def pack(self, weight: Tensor) -> Matrix | Matrices:
        """`weight` [out, in], or a stack of such, in that order; for a dtype that has none, the same object."""
        return weight

    def quantize(self, weight: Tensor, bits: Bits, search: bool = True) -> Packed:
        """`weight` [R, C] as a packed matrix. `search` looks for the best scale of each group."""
        return packed.quantize(weight, bits, search)

    def repacks(self) -> bool:
        """Whether `linear` and `experts` read packed matrices faster in an order of their own, which has no rows."""
        return False

    def repack(self, weight: Packed) -> Packed | Nibbles:
        """One packed matrix in that order; where there is none, the same object."""
        return weight

    def embedding(self, ids: Tensor, weight: Matrix, dtype: torch.dtype) -> Tensor:
        """Rows of `weight` [V, N] for `ids` [T], in `dtype`."""
        if isinstance(weight, Packed):
            blocks = Packed(
                weight.data[ids // ROWS, None], weight.row_scales.view(-1, ROWS)[ids // ROWS], weight.bits, ROWS
            )
            return blocks.dequantized(dtype)[torch.arange(len(ids), device=ids.device), ids % ROWS]
        if isinstance(weight, Quantized):
            return weight.dequantized(dtype)[ids]
        if isinstance(weight, Panels):
            return weight.lookup(ids).to(dtype)
        assert isinstance(weight, Tensor), "rows are looked up where there are rows"
        return F.embedding(ids, weight).to(dtype)

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        """`x` [T, in] by `weight` [out, in]: [T, out]."""
        if isinstance(weight, Packed | Quantized):
            return F.linear(x.float(), weight.dequantized()).to(x.dtype)
        if isinstance(weight, Panels):
            return F.linear(x.float(), weight.numbers().float()).to(x.dtype)
        if isinstance(weight, Nibbles):
            return weight.product(x)
        return F.linear(x, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x` [T, N] over its root mean square, rounded to its dtype, then times `weight` [N]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The sum of both [T, N], and its norm. The caller gives up both inputs: an override may write into them."""
        residual = residual + delta
        return residual, self.rms_norm(residual, weight, eps)

    def norm(self, stream: Tensor, pending: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`stream` [T, N] with what is pending, if anything is, and the norm of that."""
        if pending is None:
            return stream, self.rms_norm(stream, weight, eps)
        return self.add_rms_norm(stream, pending, weight, eps)

    def norm_linear(
        self, stream: Tensor, pending: Tensor | None, norm: Tensor, eps: float, weight: Matrix
    ) -> tuple[Tensor, Tensor]:
        """`norm`, then `linear`: the stream, and [T, out]."""
        stream, x = self.norm(stream, pending, norm, eps)
        return stream, self.linear(x, weight)

    def add_linear(self, stream: Tensor, x: Tensor, weight: Matrix) -> tuple[Tensor, Tensor | None]:
        """`linear` of `x`, for the stream: that with nothing pending, or as it is and what is."""
        return stream, self.linear(x, weight)

    def rotary(self, positions: Tensor, frequencies: Tensor) -> Tensor:
        """Cosine and sine of position times frequency: [T, D / 2, 2] in float32, once a step."""
        angles = positions[:, None].float() * frequencies
        return torch.stack((angles.cos(), angles.sin()), dim=-1)

    def rope_and_write(
        self, qkv: Tensor, rotary: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, num_heads: int
    ) -> Tensor:
        """Turn queries and keys of `qkv` [T, (H + 2K) D], write keys and values to their slots; the queries [T, H, D].

        Turning is over pairs of neighbours (2i, 2i + 1), in float32.
        """
        K, width = k_cache.shape[2:]
        heads = qkv.view(qkv.shape[0], -1, kv_format.head_dim(k_cache))
        q, k, v = heads[:, :num_heads], heads[:, num_heads:-K], heads[:, -K:]
        k_cache.view(-1, K, width)[slots] = kv_format.stored(_turn(k, rotary), k_cache)
        v_cache.view(-1, K, width)[slots] = kv_format.stored(v, v_cache)
        return _turn(q, rotary)

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: Layout) -> Tensor:
        """Causal attention of `q` [T, H, D] over each request's own cache, scaled by D^-1/2: [T, H D].

        Query head h reads key/value head h // (H / K). Memory stays bounded however long a context is: scores
        are made for a slice of the queries at a time.
        """
        T, H, D = q.shape
        K = k_cache.shape[2]
        out = torch.empty_like(q)
        for span, table in zip(layout.spans, layout.block_tables, strict=True):
            L = span.context_len
            keys, values = (kv_format.numbers(self._gather(cache, table, L)) for cache in (k_cache, v_cache))
            rows = max(1, _MAX_SCORES // (H * L))
            for first in range(0, span.query_len, rows):
                last = min(first + rows, span.query_len)
                piece = slice(span.query_start + first, span.query_start + last)
                position = torch.arange(span.start + first, span.start + last, device=q.device)
                later = torch.arange(L, device=q.device) > position[:, None]  # [rows, L]
                heads = q[piece].float().view(-1, K, H // K, D)
                scores = torch.einsum("tkgd,lkd->kgtl", heads, keys) * D**-0.5
                shares = scores.masked_fill(later, float("-inf")).softmax(-1)
                out[piece] = torch.einsum("kgtl,lkd->tkgd", shares, values).reshape(-1, H, D).to(q.dtype)
        return out.view(T, H * D)

    def attend(
        self, qkv: Tensor, rotary: Tensor, k_cache: Tensor, v_cache: Tensor, layout: Layout, num_heads: int
    ) -> Tensor:
        """The attention of the step's own queries in `qkv` [T, (H + 2K) D], whose keys and values are written first.

        `rope_and_write` and `attention` in one call: [T, H D].
        """
        q = self.rope_and_write(qkv, rotary, k_cache, v_cache, layout.slots, num_heads)
        return self.attention(q, k_cache, v_cache, layout)

    def norm_attend(
        self,
        stream: Tensor,
        pending: Tensor | None,
        norm: Tensor,
        eps: float,
        weight: Matrix,
        rotary: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        layout: Layout,
        num_heads: int,
    ) -> tuple[Tensor, Tensor]:
        """`norm_linear` by the queries', keys' and values' `weight`, then `attend`: the stream, and [T, H D]."""
        stream, qkv = self.norm_linear(stream, pending, norm, eps, weight)
        return stream, self.attend(qkv, rotary, k_cache, v_cache, layout, num_heads)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of `gate_up` [T, 2I], gate first: [T, I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def route(
        self, x: Tensor, weight: Tensor, correction_bias: Tensor, top_k: int, norm_min: float
    ) -> tuple[Tensor, Tensor]:
        """Which A experts each token of `x` [T, N] goes to: their weights in x's dtype and their ids, both [T, A].

        Softmax over all E experts in float32. The bias [E] takes part in the choice only: the weights are the
        unbiased probabilities of the chosen, divided by their sum or `norm_min`, whichever is larger.
        """
        probabilities = F.linear(x.float(), weight).softmax(-1)
        ids = (probabilities + correction_bias).topk(top_k, dim=-1).indices
        weights = probabilities.gather(-1, ids)
        return (weights / weights.sum(-1, keepdim=True).clamp(min=norm_min)).to(x.dtype), ids

    def experts(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        gate_up: Matrices,
        down: Matrices,
        shared: tuple[Matrix, Matrix] | None,
    ) -> Tensor:
        """The weighted sum of the chosen experts' SwiGLU MLPs, plus the MLP that all tokens share, if any: [T, N].

        `gate_up` [E, 2I, N], gate rows first; `down` [E, N, I]; `shared` is one of each. An id below 0 routes nowhere.
        An override may leave the sum to its own `add_rms_norm`, and yield parts of it side by side, [T, parts, N].
        """
        T, A = ids.shape
        rows = x.new_zeros(T * A, x.shape[1])
        flat = ids.flatten()
        for expert in sorted(set(flat.tolist())):
            if expert < 0:
                continue
            at = (flat == expert).nonzero().flatten()
            rows[at] = self._mlp(x[at // A], gate_up[expert], down[expert])
        y = (rows.view(T, A, x.shape[1]) * weights[..., None]).sum(1)
        return y if shared is None else y + self._mlp(x, *shared)

    def moe(
        self,
        x: Tensor,
        weight: Tensor,
        correction_bias: Tensor,
        top_k: int,
        norm_min: float,
        gate_up: Matrices,
        down: Matrices,
        shared: tuple[Matrix, Matrix] | None,
    ) -> Tensor:
        """`route` and `experts` in one call: what `experts` gives for the experts that the router chooses."""
        weights, ids = self.route(x, weight, correction_bias, top_k, norm_min)
        return self.experts(x, weights, ids, gate_up, down, shared)

    def norm_moe(
        self,
        stream: Tensor,
        pending: Tensor | None,
        norm: Tensor,
        eps: float,
        weight: Tensor,
        correction_bias: Tensor,
        top_k: int,
        norm_min: float,
        gate_up: Matrices,
        down: Matrices,
        shared: tuple[Matrix, Matrix] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """`norm`, then `moe`, for the stream: that with nothing pending, or as it is and what is."""
        stream, x = self.norm(stream, pending, norm, eps)
        return stream, self.moe(x, weight, correction_bias, top_k, norm_min, gate_up, down, shared)

    def _mlp(self, x: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
        return self.linear(self.swiglu(self.linear(x, gate_up)), down)

    def _gather(self, cache: Tensor, table: Tensor, length: int) -> Tensor:
        """The first `length` tokens of one request, in order: [L, K, width]."""
        num_blocks = -(-length // cache.shape[1])
        return cache[table[:num_blocks].long()].flatten(0, 1)[:length]


_MAX_SCORES = 1 << 24


def _turn(x: Tensor, rotary: Tensor) -> Tensor:
    """`x` [T, heads, D] turned pair by pair by `rotary` [T, D / 2, 2]."""
    cos, sin = rotary[:, None, :, 0], rotary[:, None, :, 1]
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
