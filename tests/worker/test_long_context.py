"""The whole context is real: 131,072 tokens through a tiny checkpoint, equal to transformers at the last position."""

import random

import pytest
import torch
from transformers import DynamicCache, Ernie4_5Config, Ernie4_5ForCausalLM
from transformers.models.ernie4_5.modeling_ernie4_5 import apply_rotary_pos_emb

from ernie_serve.kernels.cpu import CpuKernels
from ernie_serve.messages import PlanRow, SamplingParams, StepPlan
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.worker.runner import Runner

LENGTH, CHUNK, BLOCK = 131072, 8192, 64


@pytest.mark.slow
def test_the_last_token_of_a_131072_token_prompt_has_the_logits_of_transformers():
    peer = tiny_peer()
    ids = torch.randint(48, (LENGTH,), generator=torch.Generator().manual_seed(0))
    runner = Runner(like(peer), LENGTH // BLOCK, BLOCK)
    blocks = list(range(LENGTH // BLOCK))
    random.Random(0).shuffle(blocks)
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0, logprobs=48)
    prompt = ids.tolist()
    for start in range(0, LENGTH, CHUNK):
        row = PlanRow(
            request_id="long",
            token_ids=prompt[start : start + CHUNK],
            start=start,
            block_ids=blocks,
            sampling=sampling,
            wants_token=start + CHUNK == LENGTH,
            prompt_token_ids=prompt,
            output_token_ids=[],
        )
        sampled = runner.execute(StepPlan(0, [row]))
    logprobs = torch.tensor([v for _, v in sorted(sampled[0].logprobs.top)])
    expected = last_logits(peer, ids).log_softmax(-1)
    assert expected.max() - expected.min() > 1
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)


def tiny_peer():
    """One layer and one head: attention over the whole context once, and every other part of the network."""
    config = Ernie4_5Config(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        rope_theta=500000.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peer = Ernie4_5ForCausalLM(config).eval().requires_grad_(False)
        for name, p in peer.named_parameters():
            p.copy_(torch.rand_like(p) + 0.5 if "norm" in name else torch.randn_like(p) * p.shape[-1] ** -0.5)
    return peer


def like(peer):
    model = Ernie(ModelConfig.from_dict(peer.config.to_dict()), CpuKernels(), torch.float32)
    theirs = dict(peer.model.named_parameters())
    for name, p in model.named_parameters():
        if name in theirs:
            p.copy_(theirs[name])
    attention, mlp = peer.model.layers[0].self_attn, peer.model.layers[0].mlp
    ours = model.layers[0]
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    ours.self_attn.qkv_proj.weight.copy_(torch.cat([part.weight for part in parts]))
    ours.mlp.gate_up_proj.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    return model


def last_logits(peer, ids):
    """transformers for the last token, over a cache that its own first layer's parts fill without attention."""
    layer, before = peer.model.layers[0], ids[None, :-1]
    x = layer.input_layernorm(peer.model.embed_tokens(before))
    keys, values = (proj(x)[:, None] for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj))
    cos, sin = peer.model.rotary_emb(x, torch.arange(LENGTH - 1)[None])
    _, keys = apply_rotary_pos_emb(keys, keys, cos, sin)
    cache = DynamicCache()
    cache.update(keys, values, 0)
    return peer(ids[None, -1:], past_key_values=cache).logits[0, 0]
