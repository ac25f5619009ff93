"""Carries out a plan: one pass of the network over its tokens, one token for each row that wants one.

Knows the model, the KV cache and the sampler. Knows nothing of why a plan is what it is.
"""

import torch

from ernie_serve.messages import Sampled, StepPlan
from ernie_serve.model.ernie import Ernie
from ernie_serve.worker.batch import BatchBuilder
from ernie_serve.worker.sampler import Sampler


class Runner:
    """Owns the KV cache: for each layer `num_blocks` blocks of `block_size` tokens, keys and values apart.

    What it remembers of a request (its block table, its token counts) is bounded, and rebuilt from the plan if it is
    forgotten or no longer true: a request may come back after a preemption, at any start and in other blocks.
    """

    def __init__(
        self,
        model: Ernie,
        num_blocks: int,
        block_size: int,
        *,
        max_num_seqs: int = 256,
        num_valid_ids: int | None = None,
    ) -> None:
        weight, config = model.norm.weight, model.config
        self.model = model
        self.cache = [
            model.kernels.empty_cache(
                num_blocks, block_size, config.num_key_value_heads, config.head_dim, weight.dtype, weight.device
            )
            for _ in range(config.num_hidden_layers)
        ]
        self._batches = BatchBuilder(block_size, weight.device, max_requests=2 * max_num_seqs)
        self._sampler = Sampler(max_requests=2 * max_num_seqs, num_valid_ids=num_valid_ids)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> list[Sampled]:
        """Run a step; the new tokens, in the order of the rows that want one."""
        batch = self._batches.build(plan)
        logits = self.model(batch.ids, batch.layout, self.cache, batch.logit_indices)
        return self._sampler.sample(logits, batch.sampled_rows) if batch.sampled_rows else []

    @property
    def kv_bytes(self) -> int:
        """Size of the KV cache."""
        return sum(tensor.nbytes for pair in self.cache for tensor in pair)
