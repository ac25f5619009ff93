"""The verbs as plain torch does them best on a CPU, where nothing is compiled.

Knows what is cheap on a CPU: views instead of copies, few calls, and which library multiplies which shape fastest.
Numbers are those of the reference to rounding. Packed matrices are repacked for torch's own 4-bit product; those that
are not, and where torch has none, are turned into numbers slice by slice, which is right and slow.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie_serve.kernels import kv_format, nibbles
from ernie_serve.kernels.layout import Layout
from ernie_serve.kernels.nibbles import Nibbles
from ernie_serve.kernels.packed import ROWS, Packed
from ernie_serve.kernels.panels import Panels
from ernie_serve.kernels.reference import Matrices, Matrix, ReferenceKernels


class CpuKernels(ReferenceKernels):
    """Plain torch on a CPU, in float32 or bfloat16."""

    def empty_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, not zeroed: the machine gives memory only to blocks that are written."""
        shape = (num_blocks, block_size, num_kv_heads, kv_format.width(head_dim, dtype))
        element = kv_format.element(dtype)
        return torch.empty(shape, dtype=element, device=device), torch.empty(shape, dtype=element, device=device)

    def packs(self, dtype: torch.dtype) -> bool:
        """bfloat16, where oneDNN knows it: in its blocked order one row takes about half the time."""
        return dtype == torch.bfloat16 and _HAS_ONEDNN_BF16

    def pack(self, weight: Tensor) -> Matrix | Matrices:
        """The order that is read fastest, matrix by matrix."""
        if not self.packs(weight.dtype):
            return weight
        return [self._packed(matrix) for matrix in weight] if weight.dim() == 3 else self._packed(weight)

    def _packed(self, matrix: Tensor) -> Tensor | Panels:
        blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.detach())
        return blocked

    def repacks(self) -> bool:
        """For torch's own 4-bit product, if it has one."""
        return nibbles.available()

    def repack(self, weight: Packed) -> Packed | Nibbles:
        """One packed matrix as that product reads it."""
        return nibbles.repack(weight) if self.repacks() else weight

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        """`x` [T, in] by `weight` [out, in]: [T, out].

        In float32 the BLAS behind `F.linear` takes one thread for one row, and for a few rows first copies the weight
        into another order; oneDNN does neither.
        """
        if isinstance(weight, Packed):
            return torch.cat([F.linear(x, rows.dequantized(x.dtype)) for rows in _slices(weight)], dim=1)
        if isinstance(weight, Nibbles | Panels):
            return super().linear(x, weight)
        assert isinstance(weight, Tensor), "the formats of a GPU are not served on a CPU"
        if weight.is_mkldnn or (_HAS_ONEDNN and x.dtype == torch.float32):
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            return y
        return F.linear(x, weight)

    def rope_and_write(
        self, qkv: Tensor, rotary: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, num_heads: int
    ) -> Tensor:
        """Turn queries and keys of `qkv` [T, (H + 2K) D] as complex numbers, both at once; the queries [T, H, D]."""
        if k_cache.dtype != qkv.dtype:
            return super().rope_and_write(qkv, rotary, k_cache, v_cache, slots, num_heads)
        K, D = k_cache.shape[2:]
        heads = qkv.view(qkv.shape[0], -1, D)
        pairs = torch.view_as_complex(heads[:, :-K].float().view(-1, num_heads + K, D // 2, 2))  # [T, H + K, D / 2]
        turned = torch.view_as_real(pairs * torch.view_as_complex(rotary)[:, None]).flatten(-2).to(qkv.dtype)
        k_cache.view(-1, K, D).index_copy_(0, slots, turned[:, num_heads:])
        v_cache.view(-1, K, D).index_copy_(0, slots, heads[:, -K:])
        return turned[:, :num_heads]

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: Layout) -> Tensor:
        """Causal attention of `q` [T, H, D], request by request: [T, H D].

        Blocks that follow one another in memory are read in place; others are gathered first. No matrix of scores
        is ever whole, so memory grows with a context's length and not with its square.
        """
        if k_cache.dtype != q.dtype:
            return super().attention(q, k_cache, v_cache, layout)
        T, H, D = q.shape
        out = torch.empty((T, H, D), dtype=q.dtype, device=q.device)
        for span, table, first in zip(layout.spans, layout.block_tables, layout.first_blocks, strict=True):
            rows = slice(span.query_start, span.query_start + span.query_len)
            keys, values = (self._context(cache, table, first, span.context_len) for cache in (k_cache, v_cache))
            out[rows] = _attend(q[rows], keys, values)
        return out.view(T, H * D)

    def experts(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        gate_up: Matrices,
        down: Matrices,
        shared: tuple[Matrix, Matrix] | None,
    ) -> Tensor:
        """The weighted sum of the chosen experts' SwiGLU MLPs, and the shared one: [T, N].

        Rows are sorted by expert, so that each expert has a slice and nothing is scattered.
        """
        T, A = ids.shape
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        sorted_ids = flat[order].tolist()
        rows = x.new_zeros(T * A, x.shape[1])  # in sorted order
        inputs = x.expand(A, -1) if T == 1 else x[order // A]
        start = 0
        while start < T * A:
            expert, end = sorted_ids[start], start + 1
            while end < T * A and sorted_ids[end] == expert:
                end += 1
            if expert >= 0:
                rows[start:end] = self._mlp(inputs[start:end], gate_up[expert], down[expert])
            start = end
        back = torch.empty_like(order)
        back[order] = torch.arange(T * A)
        y = (rows[back].view(T, A, x.shape[1]) * weights[..., None]).sum(1)
        return y if shared is None else y + self._mlp(x, *shared)

    def _context(self, cache: Tensor, table: Tensor, first: int | None, length: int) -> Tensor:
        """One request's keys or values: [L, K, D], a view where its blocks are a run."""
        if first is None:
            return self._gather(cache, table, length)
        return cache[first:].flatten(0, 1)[:length]


_HAS_ONEDNN = bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_HAS_ONEDNN_BF16 = _HAS_ONEDNN and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiplies_in_panels(dtype: torch.dtype) -> bool:
    """Whether plain matrices of this dtype are best multiplied by operators of our own, if they can be compiled."""
    return dtype == torch.bfloat16 and not _HAS_ONEDNN_BF16


def _slices(weight: Packed) -> Iterator[Packed]:
    """A packed matrix in pieces whose numbers take a few MiB."""
    blocks = max(1, _SLICE // weight.columns // ROWS)
    for first in range(0, len(weight.data), blocks):
        data = weight.data[first : first + blocks]
        scales = weight.row_scales[first * ROWS : (first + blocks) * ROWS]
        yield Packed(data, scales, weight.bits, min(weight.rows - first * ROWS, len(scales)))


_SLICE = 1 << 21


def _attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last T of L tokens attend to themselves and what is before: `q` [T, H, D], the others [L, K, D]."""
    T, H, D = q.shape
    L, K, _ = keys.shape
    k, v = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]  # [1, K, L, D]
    if T == 1:
        return F.scaled_dot_product_attention(q.view(1, K, H // K, D), k, v).view(1, H, D)
    own = q.transpose(0, 1)[None]  # [1, H, T, D]
    own_k, own_v = (x[:, :, L - T :].repeat_interleave(H // K, dim=1) for x in (k, v))
    if T == L:
        return F.scaled_dot_product_attention(own, own_k, own_v, is_causal=True)[0].transpose(0, 1)
    # Two parts that each need no mask, joined by their log-sums: everything before the step, and the step itself.
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    grouped = q.view(T, K, H // K, D).permute(1, 2, 0, 3).reshape(1, K, H // K * T, D)
    before, before_sum = flash(grouped, k[:, :, : L - T], v[:, :, : L - T])
    inside, inside_sum = flash(own, own_k, own_v, 0.0, True)
    share = torch.sigmoid(before_sum.reshape(H, T) - inside_sum.reshape(H, T))[..., None]  # [H, T, 1] of what is before
    joined: Tensor = inside[0].float().lerp(before.reshape(H, T, D).float(), share)
    return joined.transpose(0, 1).to(q.dtype)
