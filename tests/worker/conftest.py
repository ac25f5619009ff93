"""A tiny random model, and a plain stand-in for the engine that makes plans by hand."""

import random
from dataclasses import dataclass, field

import pytest
import torch

from ernie_serve.kernels.cpu import CpuKernels
from ernie_serve.messages import PlanRow, SamplingParams, StepPlan
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie

VOCAB_SIZE = 96

TINY = ModelConfig(
    model_type="ernie4_5_moe",
    vocab_size=VOCAB_SIZE,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    tie_word_embeddings=True,
    moe_num_experts=8,
    moe_k=3,
    moe_intermediate_size=24,
    moe_num_shared_experts=1,
    moe_layer_start_index=1,
    moe_layer_end_index=2,
)


@pytest.fixture(scope="session")
def tiny_config():
    return TINY


@pytest.fixture(scope="session")
def tiny_model():
    model = Ernie(TINY, CpuKernels(), torch.float32)
    chance = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=chance)
        p.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else noise * 1.5 * p.shape[-1] ** -0.5)
    return model


@pytest.fixture
def make_text():
    """A text to continue: `make_text(prompt_len, seed=…, **sampling)`."""

    def make(length, name="a", **sampling):
        chance = random.Random(f"{name} {length}")
        prompt = [chance.randrange(VOCAB_SIZE) for _ in range(length)]
        return Text(
            name, prompt, SamplingParams(**{"max_tokens": 99, "seed": 1, "temperature": 0, "logprobs": 4} | sampling)
        )

    return make


@dataclass(eq=False)
class Text:
    """One request as an engine would keep it."""

    name: str
    prompt: list[int]
    sampling: SamplingParams
    output: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0

    def row(self, pool, block_size, count=None):
        """Compute `count` of the pending tokens (all by default), in blocks taken from the end of `pool`."""
        tokens = self.prompt + self.output
        end = len(tokens) if count is None else min(len(tokens), self.computed + count)
        while len(self.blocks) * block_size < end:
            self.blocks.append(pool.pop())
        row = PlanRow(
            request_id=self.name,
            token_ids=tokens[self.computed : end],
            start=self.computed,
            block_ids=self.blocks,
            sampling=self.sampling,
            wants_token=end == len(tokens),
            prompt_token_ids=self.prompt,
            output_token_ids=self.output,
        )
        self.computed = end
        return row

    def preempt(self, pool):
        """Give all blocks back; what was computed is lost."""
        pool.extend(self.blocks)
        self.blocks, self.computed = [], 0


@pytest.fixture
def step():
    """Run rows in one step and append the new tokens: `step(runner, {text: row})`; what was sampled, by name."""

    def run(runner, rows):
        sampled = runner.execute(StepPlan(0, list(rows.values())))
        by_name = {text.name: text for text in rows}
        for one in sampled:
            by_name[one.request_id].output.append(one.token_id)
        return {one.request_id: one for one in sampled}

    return run
