"""The verbs of a GPU for a step of one row, where what comes before and behind a matrix has no kernel of its own.

Knows which verb is which kernel, and what those do not take: that goes the way of several rows. Knows no graph.
"""

import torch
from torch import Tensor

from ernie_serve.kernels.cuda import CudaKernels, beside
from ernie_serve.kernels.layout import Layout
from ernie_serve.kernels.quantized import Quantized
from ernie_serve.kernels.reference import Matrices, Matrix
from ernie_serve.kernels.triton import experts_of_one, one_row


class FusedCudaKernels(CudaKernels):
    """What `CudaKernels` does, one row in fewer launches: seven a layer of experts instead of eleven.

    That a row is padding is not asked: a step of one row has none.
    """

    fuses = True
    """Whether one row has launches of its own at all."""

    def norm_linear(
        self, stream: Tensor, pending: Tensor | None, norm: Tensor, eps: float, weight: Matrix
    ) -> tuple[Tensor, Tensor]:
        """The stream, and its norm by a matrix; of one row in one kernel."""
        if self.fuses and isinstance(weight, Tensor | Quantized) and one_row.suits(stream, weight):
            stream, x, unmade = self._norm_or_leave(stream, pending, norm, eps)
            return stream, one_row.linear(x, weight, unmade, eps)
        return super().norm_linear(stream, pending, norm, eps, weight)

    def add_linear(self, stream: Tensor, x: Tensor, weight: Matrix) -> tuple[Tensor, Tensor | None]:
        """The stream and what is pending; of one row it is added where it is made."""
        if self.fuses and isinstance(weight, Tensor | Quantized) and one_row.suits(x, weight):
            return one_row.add_linear(stream, x, weight), None
        return super().add_linear(stream, x, weight)

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
        """The stream, and the attention of its norm; of one row all is turned and written as it is made."""
        if (
            self.fuses
            and isinstance(weight, Tensor | Quantized)
            and one_row.suits(stream, weight)
            and one_row.turns(k_cache)
        ):
            stream, x, unmade = self._norm_or_leave(stream, pending, norm, eps)
            q = one_row.linear_and_turn(x, weight, unmade, eps, rotary, k_cache, v_cache, layout.slots, num_heads)
            return stream, self.attention(q, k_cache, v_cache, layout)
        return super().norm_attend(stream, pending, norm, eps, weight, rotary, k_cache, v_cache, layout, num_heads)

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
        """The stream, and what is pending; of one row gate and up choose their experts, and down adds to the stream."""
        if (
            self.fuses
            and isinstance(gate_up, Tensor | Quantized)
            and isinstance(down, Tensor | Quantized)
            and one_row.suits(stream, weight, 1)
            and ((inside := beside(shared, gate_up, down)) or shared is None)
            and experts_of_one.suits(down, top_k, inside)
        ):
            stream, x, unmade = self._norm_or_leave(stream, pending, norm, eps)
            is_half = isinstance(gate_up, Quantized) and x.dtype == torch.bfloat16
            scores, x = one_row.scores(x, weight, unmade, eps, torch.float16 if is_half else x.dtype)
            return experts_of_one.experts_of_one(
                x, scores, correction_bias, top_k, norm_min, gate_up, down, inside, stream
            )
        return super().norm_moe(
            stream, pending, norm, eps, weight, correction_bias, top_k, norm_min, gate_up, down, shared
        )

    def _norm_or_leave(
        self, stream: Tensor, pending: Tensor | None, norm: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The stream, and what to multiply: itself and a norm yet to be made, or its norm if something is pending."""
        if pending is None:
            return stream, stream, norm
        return *self.add_rms_norm(stream, pending, norm, eps), None
