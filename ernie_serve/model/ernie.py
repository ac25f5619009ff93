"""The network: ERNIE 4.5, dense or mixture of experts, on one page.

Knows layers and how they connect. Knows no device, no weight format, no parallelism, no request: arithmetic is the
kernels' that are handed in, and where tokens stand is the layout's.
"""

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ernie_serve.kernels.layout import Ends, Layout
from ernie_serve.kernels.reference import Matrices, Matrix
from ernie_serve.kernels.reference import ReferenceKernels as Kernels
from ernie_serve.model.config import ModelConfig

# T tokens in the batch, N hidden size, V vocabulary, H query heads, K key/value heads, D head size,
# I MLP width, E experts, A active experts, B blocks of S tokens

KVCache = Iterable[tuple[Tensor, Tensor]]
"""Keys and values of one layer after the other, each [B, S, K, D], or wider where a row brings its scale."""


class Part(nn.Module):
    """A module that is called, and whose parts and parameters are found, without torch's detours: no hook ever runs.

    A decode step calls hundreds of modules between products of which each empties the processor's caches.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__call__ = cls.forward  # type: ignore[method-assign]  # which torch declares as a value

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__[name] = value  # or parts and parameters would be missed here before torch's own lookup

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.__dict__.pop(name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not type it
        self.__dict__.update(self._parameters)  # it may have put others in their places
        return self


class Ernie(Part):
    """From token ids to logits. Parameters are empty until a loader fills them; no gradient is ever kept.

    Built under `torch.device("meta")` it takes no memory; `to_empty` then gives it some.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.rotary = Rotary(config.head_dim, config.rope_theta, kernels)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, kernels, dtype)
        self.layers = nn.ModuleList(Block(config, index, kernels, dtype) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, kernels, dtype)
        self.requires_grad_(False)

    def forward(
        self, ids: Tensor, layout: Layout, cache: KVCache, logit_indices: Tensor, ends: Ends | None = None
    ) -> Tensor:
        """Logits [rows, V] after the tokens at `logit_indices` of `ids` [T]; writes all of them into `cache`.

        Where those tokens are the `ends` of requests, the last layer computes nothing for others but keys and values.
        """
        rotary = self.rotary(layout.positions)
        residual, x = self.embed_tokens(ids), None
        last = self.layers[-1]
        for block, (k_cache, v_cache) in zip(self.layers, cache, strict=True):
            residual, x = block(residual, x, rotary, k_cache, v_cache, layout, ends if block is last else None)
        if ends is None:
            residual, x = residual[logit_indices], None if x is None else x[logit_indices]
        _, x = self.norm(residual, x)
        return self.embed_tokens.project(x) if self.config.tie_word_embeddings else self.lm_head(x)


class Block(Part):
    """Attention, then an MLP, each added to the stream that runs past them."""

    def __init__(self, config: ModelConfig, index: int, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, dtype)
        self.self_attn = Attention(config, kernels, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, dtype)
        self.mlp: nn.Module
        if config.is_moe_layer(index):
            self.mlp = MoE(config, kernels, dtype)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, kernels, dtype)

    def forward(
        self,
        residual: Tensor,
        x: Tensor | None,
        rotary: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        layout: Layout,
        ends: Ends | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The stream so far, and what the block before has yet to add to it; the same of this block, or of its ends."""
        residual, x = self.self_attn(residual, x, self.input_layernorm, rotary, k_cache, v_cache, layout, ends)
        if ends is not None:
            residual = residual[ends.tokens]
            if not len(residual):
                return residual, x
        residual, x = self.mlp(residual, x, self.post_attention_layernorm)
        return residual, x


class Attention(Part):
    """Grouped-query attention with rotary positions over a paged cache."""

    def __init__(self, config: ModelConfig, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernels = kernels
        self.num_heads = H = config.num_attention_heads
        K, D = config.num_key_value_heads, config.head_dim
        self.qkv_proj = Linear(config.hidden_size, (H + 2 * K) * D, kernels, dtype)
        self.o_proj = Linear(H * D, config.hidden_size, kernels, dtype)

    def forward(
        self,
        residual: Tensor,
        x: Tensor | None,
        norm: "RMSNorm",
        rotary: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        layout: Layout,
        ends: Ends | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Every token [T, N], or the `ends`, attend to all before; keys and values are written on the way.

        The stream, and what is to be added to it; of `ends` it is [R, N].
        """
        H, normed = self.num_heads, (norm.weight, norm.eps, self.qkv_proj.weight)
        if ends is None:
            residual, heads = self.kernels.norm_attend(
                residual, x, *normed, rotary, k_cache, v_cache, layout, H
            )  # [T, H D]
            return self.kernels.add_linear(residual, heads, self.o_proj.weight)
        residual, qkv = self.kernels.norm_linear(residual, x, *normed)  # [T, (H + 2K) D]
        q = self.kernels.rope_and_write(qkv, rotary, k_cache, v_cache, layout.slots, H)
        if not len(ends.tokens):
            return residual, residual[:0]
        heads = self.kernels.attention(q[ends.tokens], k_cache, v_cache, ends.layout)  # [R, H D]
        return residual, self.o_proj(heads)


class MLP(Part):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up as one matrix."""

    def __init__(self, hidden_size: int, width: int, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up_proj = Linear(hidden_size, 2 * width, kernels, dtype)
        self.down_proj = Linear(width, hidden_size, kernels, dtype)

    def forward(self, residual: Tensor, x: Tensor | None, norm: "RMSNorm") -> tuple[Tensor, Tensor | None]:
        """The stream [T, N], and what is to be added to it."""
        residual, gate_up = self.kernels.norm_linear(residual, x, norm.weight, norm.eps, self.gate_up_proj.weight)
        return self.kernels.add_linear(residual, self.kernels.swiglu(gate_up), self.down_proj.weight)

    @property
    def matrices(self) -> tuple[Matrix, Matrix]:
        """Gate and up, and down, for whoever runs this beside something else."""
        return self.gate_up_proj.weight, self.down_proj.weight


class MoE(Part):
    """A few routed experts a token, and beside them one shared MLP that every token takes."""

    def __init__(self, config: ModelConfig, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernels = kernels
        self.top_k = config.moe_k
        self.norm_min = config.moe_norm_min
        self.router = Router(config)
        self.experts = Experts(config, dtype)
        width = config.shared_intermediate_size
        self.shared = MLP(config.hidden_size, width, kernels, dtype) if width else None

    def forward(self, residual: Tensor, x: Tensor | None, norm: "RMSNorm") -> tuple[Tensor, Tensor | None]:
        """The stream [T, N], and what is to be added to it."""
        router, experts = self.router, self.experts
        shared = self.shared.matrices if self.shared is not None else None
        return self.kernels.norm_moe(
            residual,
            x,
            norm.weight,
            norm.eps,
            router.weight,
            router.correction_bias,
            self.top_k,
            self.norm_min,
            experts.gate_up,
            experts.down,
            shared,
        )


class Router(Part):
    """What chooses the experts of each token. Float32 whatever the model's dtype: a rounded score flips the choice."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = _empty(config.moe_num_experts, config.hidden_size, dtype=torch.float32)
        self.correction_bias = _empty(config.moe_num_experts, dtype=torch.float32)


class Experts(Part):
    """E SwiGLU MLPs in two stacked matrices, gate rows before up rows."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        E, N, width = config.moe_num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up: Matrices = _empty(E, 2 * width, N, dtype=dtype)
        self.down: Matrices = _empty(E, N, width, dtype=dtype)


class RMSNorm(Part):
    """Adds what is pending to the stream, and norms the sum."""

    def __init__(self, size: int, eps: float, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernels = kernels
        self.eps = eps
        self.weight = _empty(size, dtype=dtype)

    def forward(self, residual: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """`residual` + `delta`, and the norm of that; both [T, N]."""
        return self.kernels.norm(residual, delta, self.weight, self.eps)


class Linear(Part):
    """A matrix [out, in] without bias."""

    def __init__(self, in_features: int, out_features: int, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight: Matrix = _empty(out_features, in_features, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] to [T, out]."""
        return self.kernels.linear(x, self.weight)


class Embedding(Part):
    """A row for every token id, and, where the head is tied, the matrix of the logits.

    `head` is that matrix in an order of its own, where there is one.
    """

    def __init__(self, vocab_size: int, hidden_size: int, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernels = kernels
        self.dtype = dtype
        self.weight: Matrix = _empty(vocab_size, hidden_size, dtype=dtype)
        self.head: Matrix | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """[T] to [T, N]."""
        return self.kernels.embedding(ids, self.weight, self.dtype)

    def project(self, x: Tensor) -> Tensor:
        """[T, N] to logits [T, V]."""
        return self.kernels.linear(x, self.weight if self.head is None else self.head)


class Rotary:
    """The turning speeds of the head's pairs: theta^(-2i/D) for pair i.

    They are computed, not loaded, so they are no parameters and outlive `to_empty`; always on the CPU first, so that
    every device turns by the same numbers.
    """

    def __init__(self, head_dim: int, theta: float, kernels: Kernels) -> None:
        self.kernels = kernels
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        self.frequencies = 1.0 / theta**exponents

    def __call__(self, positions: Tensor) -> Tensor:
        """Cosines and sines of `positions` [T]: [T, D / 2, 2]."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        return self.kernels.rotary(positions, self.frequencies)


def _empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
