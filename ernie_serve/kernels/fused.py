"""The verbs that `cpu.cpp` does in one call each: those of packed matrices and of panels, attention over the cache,
and the small ones whose cost in plain torch is the calling.

Knows which verb is which operator, and what an operator does not take. Knows nothing of how they are compiled.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ernie_serve.kernels import kv_format, packed
from ernie_serve.kernels.cpu import CpuKernels, multiplies_in_panels
from ernie_serve.kernels.layout import Layout
from ernie_serve.kernels.native import Operators, is_compiled, operators
from ernie_serve.kernels.packed import Bits, Packed
from ernie_serve.kernels.panels import PANEL, Panels
from ernie_serve.kernels.reference import Matrices, Matrix

_WIDE = 16  # floats: what comes in rows that are no multiple of it is left to plain torch


def cpu_kernels_for(dtype: torch.dtype, *, has_packed: bool = False, num_bytes: int | None = None) -> CpuKernels:
    """The best for `num_bytes` of weights in a dtype and, perhaps, something in 4 or 8 bits.

    Where torch multiplies as fast as our operators nothing is compiled, and neither is it for a small model alone: so
    the first start of one answers at once. Our operators know no float16.
    """
    if dtype == torch.float16:
        return CpuKernels()
    if has_packed:
        return cpu_kernels()
    if not multiplies_in_panels(dtype) or (num_bytes is not None and num_bytes < _SMALL and not is_compiled()):
        return CpuKernels()
    return cpu_kernels()


_SMALL = 256 << 20


def cpu_kernels() -> CpuKernels:
    """The best that this machine can do; compiles when the cache is empty."""
    ops = operators()
    return CpuKernels() if ops is None else FusedCpuKernels(ops)


class FusedCpuKernels(CpuKernels):
    """What `CpuKernels` does, by the operators: in fewer calls, and with packed matrices and panels as they are.

    With these no token's numbers depend on its neighbours.
    """

    def __init__(self, ops: Operators) -> None:
        super().__init__()
        self._ops = ops

    def packs(self, dtype: torch.dtype) -> bool:
        """bfloat16: in oneDNN's order or, where it has none, in panels."""
        return super().packs(dtype) or multiplies_in_panels(dtype)

    def _packed(self, matrix: Tensor) -> Tensor | Panels:
        if multiplies_in_panels(matrix.dtype):
            return Panels(self._ops.panels(matrix.detach()), matrix.shape[0])
        return super()._packed(matrix)

    def quantize(self, weight: Tensor, bits: Bits, search: bool = True) -> Packed:
        """`weight` [R, C] as a packed matrix, with the numbers of `packed.quantize` but for a few ties."""
        weight = weight.float() if weight.dtype == torch.float16 else weight
        made = packed.empty(weight.shape[0], weight.shape[1], bits)
        self._ops.quantize(weight.detach(), bits, search, made.data, made.row_scales)
        return made

    def repacks(self) -> bool:
        """The operators read packed matrices as they are."""
        return False

    def embedding(self, ids: Tensor, weight: Matrix, dtype: torch.dtype) -> Tensor:
        """Rows of `weight` [V, N] for `ids` [T], in `dtype`."""
        if isinstance(weight, Packed):
            y: Tensor = self._ops.embedding(ids, *weight.handed, weight.rows, dtype)
            return y
        if isinstance(weight, Panels):
            rows: Tensor = self._ops.panel_embedding(ids, weight.data, weight.rows, dtype)
            return rows
        return super().embedding(ids, weight, dtype)

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        """`x` [T, in] by `weight` [out, in]: [T, out]. With a packed one, `x` is rounded to 8 bits."""
        if type(weight) is Packed:  # first, and without asking more: a decode step does it some sixty times
            y: Tensor = self._ops.linear(x, weight.data, weight.row_scales, weight.bits, weight.rows)
            return y
        if isinstance(weight, Panels):
            panels_y: Tensor = self._ops.panel_linear(x, weight.data, weight.rows)
            return panels_y
        return super().linear(x, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x` [T, N] over its root mean square, rounded to its dtype, then times `weight` [N]."""
        y: Tensor = self._ops.add_rms_norm(x, None, weight, eps)
        return y

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The sum of both [T, N], written into `residual`, and its norm."""
        return residual, self._ops.add_rms_norm(residual, delta, weight, eps)

    def route(
        self, x: Tensor, weight: Tensor, correction_bias: Tensor, top_k: int, norm_min: float
    ) -> tuple[Tensor, Tensor]:
        """The experts of each token of `x` [T, N]: weights and ids, both [T, A]. Of equals the first is taken."""
        if x.shape[-1] % _WIDE:
            return super().route(x, weight, correction_bias, top_k, norm_min)
        weights, ids = self._ops.route(x, weight, correction_bias, top_k, norm_min)
        return weights, ids

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
        """The experts of each token, chosen and computed."""
        y: Tensor
        if (whole := _handed_packed(gate_up, down, shared)) is not None:
            y = self._ops.moe(x, weight, correction_bias, top_k, norm_min, *whole)
            return y
        if (panels := _handed_panels(gate_up, down, shared)) is not None:
            y = self._ops.panel_moe(x, weight, correction_bias, top_k, norm_min, *panels)
            return y
        return super().moe(x, weight, correction_bias, top_k, norm_min, gate_up, down, shared)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of `gate_up` [T, 2I], gate first: [T, I]."""
        if gate_up.shape[1] % _WIDE:
            return super().swiglu(gate_up)
        y: Tensor = self._ops.swiglu(gate_up)
        return y

    def rotary(self, positions: Tensor, frequencies: Tensor) -> Tensor:
        """Cosine and sine of position times frequency: [T, D / 2, 2] in float32, once a step."""
        y: Tensor = self._ops.rotary(positions, frequencies)
        return y

    def rope_and_write(
        self, qkv: Tensor, rotary: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, num_heads: int
    ) -> Tensor:
        """Turn queries and keys of `qkv` [T, (H + 2K) D], write keys and values to their slots; the queries."""
        if kv_format.head_dim(k_cache) % 8:
            return super().rope_and_write(qkv, rotary, k_cache, v_cache, slots, num_heads)
        q: Tensor = self._ops.rope_and_write(qkv, rotary, k_cache, v_cache, slots, num_heads)
        return q

    def attend(
        self, qkv: Tensor, rotary: Tensor, k_cache: Tensor, v_cache: Tensor, layout: Layout, num_heads: int
    ) -> Tensor:
        """Turn, write and attend: [T, H D]."""
        if rotary.shape[1] % 4:  # it has one angle for two numbers of a head
            return super().attend(qkv, rotary, k_cache, v_cache, layout, num_heads)
        y: Tensor = self._ops.attend(
            qkv,
            rotary,
            k_cache,
            v_cache,
            layout.slots,
            num_heads,
            layout.block_tables,
            layout.query_starts,
            layout.context_lens,
        )
        return y

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: Layout) -> Tensor:
        """Causal attention of `q` [T, H, D] over the cache where it lies, block by block: [T, H D]."""
        if q.shape[-1] % 8 or q.dtype not in (torch.float32, torch.bfloat16):
            return super().attention(q, k_cache, v_cache, layout)
        y: Tensor = self._ops.attention(
            q, k_cache, v_cache, layout.block_tables, layout.query_starts, layout.context_lens
        )
        return y


def _handed_packed(
    gate_up: Matrices, down: Matrices, shared: tuple[Matrix, Matrix] | None
) -> tuple[Tensor | int | None, ...] | None:
    """How the operator is handed packed experts; none of others."""
    if not (isinstance(gate_up, Packed) and isinstance(down, Packed)):
        return None
    if shared is None:
        return gate_up.handed + down.handed + _NONE + _NONE
    first, second = shared
    if not (isinstance(first, Packed) and isinstance(second, Packed)):
        return None
    return gate_up.handed + down.handed + first.handed + second.handed


def _handed_panels(
    gate_up: Matrices, down: Matrices, shared: tuple[Matrix, Matrix] | None
) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None] | None:
    """How the operator is handed experts in panels; none of others, nor of widths that are not whole panels."""
    if not (isinstance(gate_up, Sequence) and isinstance(down, Sequence)):
        return None
    ups, downs = ([matrix for matrix in stack if isinstance(matrix, Panels)] for stack in (gate_up, down))
    beside = [matrix for matrix in shared or () if isinstance(matrix, Panels)]
    if len(ups) < len(gate_up) or len(downs) < len(down) or len(beside) < len(shared or ()):
        return None
    if downs[0].rows % PANEL or any(matrix.rows % (4 * PANEL) for matrix in (ups[0], *beside[:1])):
        return None
    both = (beside[0].data, beside[1].data) if beside else (None, None)
    return [matrix.data for matrix in ups], [matrix.data for matrix in downs], *both


_NONE = (None, None, 0)
"""How an operator is handed no matrix."""
