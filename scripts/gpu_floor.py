"""The least time a step can take: bytes over bandwidth, or arithmetic over its rate, whichever is longer.

Knows a geometry and two rates. A decode step of B tokens touches E (1 - (1 - A / E)^B) distinct experts a layer if
routing is uniform; `gpu_check` counts what it really was.
"""

from dataclasses import dataclass

from ernie_serve.model.config import ModelConfig

BITS = {"bf16": 16.0, "fp8": 8.0, "int8": 8.0, "int4": 4.25}
"""Bits of an expert's weight, scales of int4 groups included; of attention and a dense MLP 8 beside all but bf16."""


@dataclass(frozen=True)
class Floor:
    """Floors of one model on one card; bandwidth in bytes and arithmetic in operations a second."""

    config: ModelConfig
    bandwidth: float
    arithmetic: float
    format: str = "bf16"

    def experts_hit(self, tokens: int) -> float:
        c = self.config
        return c.moe_num_experts * (1 - (1 - c.moe_k / c.moe_num_experts) ** tokens) if c.moe_num_experts else 0.0

    @property
    def _expert(self) -> int:
        return 3 * self.config.hidden_size * self.config.moe_intermediate_size

    @property
    def _attention(self) -> int:
        c = self.config
        return c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)

    def _layers(self) -> tuple[int, int]:
        moe = sum(self.config.is_moe_layer(i) for i in range(self.config.num_hidden_layers))
        return moe, self.config.num_hidden_layers - moe

    def weight_bytes(self, tokens: int) -> float:
        c, (moe, dense) = self.config, self._layers()
        shared = 3 * c.hidden_size * c.shared_intermediate_size if moe else 0
        quantized = moe * (self.experts_hit(tokens) * self._expert + shared) * BITS[self.format] / 8
        alone = c.num_hidden_layers * self._attention + dense * 3 * c.hidden_size * c.intermediate_size
        quantized += alone * max(8.0, BITS[self.format]) / 8
        return quantized + 2 * c.vocab_size * c.hidden_size + 4 * moe * c.moe_num_experts * c.hidden_size

    def _operations(self, tokens: int, heads: int) -> float:
        c, (moe, dense) = self.config, self._layers()
        active = c.num_hidden_layers * self._attention + dense * 3 * c.hidden_size * c.intermediate_size
        shared = 3 * c.hidden_size * c.shared_intermediate_size
        active += moe * (c.moe_k * self._expert + shared)
        return 2.0 * tokens * active + 2.0 * heads * c.vocab_size * c.hidden_size

    def decode_seconds(self, streams: int, context: int, kv_bytes: int = 2) -> float:
        c = self.config
        kv = streams * context * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * kv_bytes
        attention = 4.0 * streams * context * c.num_hidden_layers * c.num_attention_heads * c.head_dim
        work = self._operations(streams, streams) + attention
        return max((self.weight_bytes(streams) + kv) / self.bandwidth, work / self.arithmetic)

    def prefill_seconds(self, tokens: int) -> float:
        c = self.config
        attention = 2.0 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * tokens * (tokens + 1)
        work = self._operations(tokens, 1) + attention
        return max(work / self.arithmetic, self.weight_bytes(tokens) / self.bandwidth)
