"""The verbs on a GPU: Triton where a decode step is made of reading, plain torch where a prompt is made of arithmetic.

Knows which kernel takes which shape. Knows no graph, no request. Numbers are those of the reference to rounding.
Nothing here waits for the device, so a decode step can be recorded.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie_serve.kernels import kv_format, prompt_attention
from ernie_serve.kernels.layout import Layout, Run
from ernie_serve.kernels.nibbles import Nibbles
from ernie_serve.kernels.packed import Packed
from ernie_serve.kernels.panels import Panels
from ernie_serve.kernels.quantized import Quantized
from ernie_serve.kernels.reference import Matrices, Matrix, ReferenceKernels
from ernie_serve.kernels.triton import align, attention, experts, linear, norm, prompt, rope, router, sampling


class CudaKernels(ReferenceKernels):
    """Triton and torch on one GPU, in bfloat16 or float32; under Triton's interpreter also on a CPU."""

    def __init__(self) -> None:
        self._num_live: Tensor | None = None

    @contextmanager
    def padded(self, num_live: Tensor) -> Iterator[None]:
        """Within this, rows from `num_live` [1] on are padding, which no expert computes. The tensor is read later."""
        self._num_live = num_live
        try:
            yield
        finally:
            self._num_live = None

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        """Few rows by Triton, more by torch, for which a matrix of 8 bits is made wide."""
        if not isinstance(weight, Tensor | Quantized):
            return super().linear(x, weight)
        if linear.suits(x, weight):
            return linear.linear(x, weight)
        if isinstance(weight, Quantized) and weight.format != "int4":
            weight = linear.widened(weight, x.dtype)
        return super().linear(x, weight)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of rows [T, 2 W], in one pass."""
        return prompt.swiglu(gate_up) if len(gate_up) else super().swiglu(gate_up)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x` [T, N] over its root mean square, times `weight` [N]."""
        return norm.add_rms_norm(x, None, weight, eps)[1]

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The sum of both, and its norm; a `delta` [T, P, N] is summed on the way."""
        return norm.add_rms_norm(residual, delta, weight, eps)

    def rope_and_write(
        self, qkv: Tensor, rotary: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, num_heads: int
    ) -> Tensor:
        """The queries [T, H, D], turned; a slot below 0 writes nothing."""
        return rope.rope_and_write(qkv, rotary, k_cache, v_cache, slots, num_heads)

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: Layout) -> Tensor:
        """One kernel for all requests with one token; prompts run by run, in order, by what torch has for them.

        In float32, which flash attention does not take, torch would make all scores at once: the reference does not.
        """
        T, H, D = q.shape
        if all(span.query_len == 1 for span in layout.spans):
            longest = max(span.context_len for span in layout.spans)
            splits = attention.splits_for(len(layout.spans), k_cache.shape[2], longest, q.device)
            return attention.decode_attention(q, k_cache, v_cache, layout.block_tables, layout.context_lens, splits)
        if q.dtype == torch.float32:
            return super().attention(q, k_cache, v_cache, layout)
        if len(layout.runs) == 1 and layout.runs[0].tokens == slice(0, T):
            return self._attend(q, k_cache, v_cache, layout.runs[0]).reshape(T, H * D)
        out = torch.empty_like(q)
        if some := layout.decodes:
            out[some.tokens] = self.attention(q[some.tokens], k_cache, v_cache, some.layout).view(-1, H, D)
        for run in layout.runs:
            out[run.tokens] = self._attend(q[run.tokens], k_cache, v_cache, run)
        return out.view(T, H * D)

    def _attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, run: Run) -> Tensor:
        """A run's tokens to their contexts, which are let go before those of the next are there: [T, H, D]."""
        keys, values = (self._context(cache, run.slots, q.dtype) for cache in (k_cache, v_cache))
        return prompt_attention.attend(q, keys, values, run)

    def _context(self, cache: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """The tokens at `slots` [L] in `dtype`: [L, K, D]; of 8 bits some at a time.

        On their way they are float32, which for all of a long context at once would take several times the result.
        """
        tokens = cache.flatten(0, 1)
        if cache.dtype == dtype:
            return tokens[slots]
        wide = torch.empty((len(slots), cache.shape[2], kv_format.head_dim(cache)), dtype=dtype, device=cache.device)
        for first in range(0, len(slots), _WIDENED):
            some = slice(first, first + _WIDENED)
            wide[some] = kv_format.numbers(tokens[slots[some]])
        return wide

    def route(
        self, x: Tensor, weight: Tensor, correction_bias: Tensor, top_k: int, norm_min: float
    ) -> tuple[Tensor, Tensor]:
        """Weights and int32 ids of each token's experts."""
        return router.route(x, weight, correction_bias, top_k, norm_min, self._num_live)

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
        """`route` and `experts`; what quantized experts read is put into half precision by the router on its way."""
        if not isinstance(gate_up, Quantized) or x.dtype != torch.bfloat16:
            return super().moe(x, weight, correction_bias, top_k, norm_min, gate_up, down, shared)
        half = torch.empty_like(x, dtype=torch.float16)
        weights, ids = router.route(x, weight, correction_bias, top_k, norm_min, self._num_live, half)
        return self.experts(x, weights, ids, gate_up, down, shared, half)

    def experts(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        gate_up: Matrices,
        down: Matrices,
        shared: tuple[Matrix, Matrix] | None,
        half: Tensor | None = None,
    ) -> Tensor:
        """The experts' outputs, summed, or one beside the other, [T, P, N], for `add_rms_norm` to sum.

        Few tokens, and all with quantized weights, go through Triton. A prompt in 16 bit goes through grouped GEMMs,
        which alone sum, and which wait for the host where torch has no kernel for them (before Hopper, and of all but
        bfloat16), so that no recorded step takes them. A shared MLP in another format than the experts is computed by
        itself. `half` is `x` in half precision, where somebody has it already.
        """
        if not isinstance(gate_up, Tensor | Quantized) or not isinstance(down, Tensor | Quantized):
            return super().experts(x, weights, ids, gate_up, down, shared)
        inside = beside(shared, gate_up, down)
        is_recorded = self._num_live is not None
        if len(x) > _MOST_BY_TRITON and not is_recorded and isinstance(gate_up, Tensor) and isinstance(down, Tensor):
            return self._grouped(x, weights, ids, gate_up, down, None if shared is None else self._mlp(x, *shared))
        slots = experts.experts(x if half is None else half, weights, ids, gate_up, down, inside)
        if shared is not None and inside is None:
            slots = torch.cat((slots, self._mlp(x, *shared)[:, None]), dim=1)
        return slots

    def _grouped(
        self, x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, base: Tensor | None
    ) -> Tensor:
        """Rows sorted by expert, two grouped GEMMs, and back, added to `base`. Rows that route nowhere come last."""
        tokens, places, ends = align.sort(ids, len(gate_up))
        hidden = prompt.swiglu(F.grouped_mm(x[tokens], gate_up.transpose(1, 2), offs=ends), ends[-1:])
        rows = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)
        return prompt.combine(rows, places, weights, base)

    def sample(self, logits: Tensor, settings: Tensor, top_ks: Tensor, num_valid_ids: int) -> Tensor:
        """A token for each row of `logits` [R, V]; `sampling.sample` says what the others are."""
        return sampling.sample(logits, settings, top_ks, num_valid_ids)


_WIDENED = 8192  # tokens at a time
_MOST_BY_TRITON = 1536  # tokens; above, an expert has so many rows that arithmetic decides


def beside(
    shared: tuple[Matrix, Matrix] | None, gate_up: Tensor | Quantized, down: Tensor | Quantized
) -> tuple[Tensor | Quantized, Tensor | Quantized] | None:
    """The shared MLP, if there is one of the experts' own format, so that one kernel reads it with them."""
    if shared is None:
        return None
    first, second = shared
    if isinstance(first, Packed | Panels | Nibbles) or isinstance(second, Packed | Panels | Nibbles):  # those of a CPU
        return None
    return (first, second) if _is_as(first, gate_up) and _is_as(second, down) else None


def _is_as(one: Tensor | Quantized, other: Tensor | Quantized) -> bool:
    return linear.format_of(one) == linear.format_of(other) and _element(one) == _element(other)


def _element(weight: Tensor | Quantized) -> torch.dtype:
    return weight.dtype if isinstance(weight, Tensor) else weight.data.dtype
