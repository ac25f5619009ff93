"""131,072 tokens of context are real: such a prompt runs, and its last position has the numbers of the reference."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ernie_serve.config import Settings
from ernie_serve.engine_process import build_engine
from ernie_serve.messages import EngineRequest, SamplingParams
from ernie_serve.model.random_tokenizer import random_tokenizer

LENGTH = 131_072
VOCAB_SIZE = 640


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One layer, one head: what is long here is the context."""
    config = Ernie4_5_MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=LENGTH,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=8,
        moe_layer_start_index=0,
        tie_word_embeddings=True,
    )
    model = Ernie4_5_MoeForCausalLM(config)
    chance = torch.Generator().manual_seed(9)
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        scale = 0.1 if "correction_bias" in name else 1.0 if tensor.dim() == 1 else 2 * tensor.shape[-1] ** -0.5
        tensor.data = scale * torch.randn(tensor.shape, generator=chance)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(random_tokenizer(VOCAB_SIZE)), encoding="utf-8")
    return tmp_path


def attend_last(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> tuple[Tensor, None]:
    """transformers' own attention for the last query alone: in a single layer the others do not reach its logits."""
    out = query.new_zeros(query.transpose(1, 2).shape)
    out[:, -1:] = sdpa_attention_forward(module, query[:, :, -1:], key, value, None, is_causal=False, **more)[0]
    return out, None


def test_the_last_position_of_a_full_context_agrees_with_transformers(checkpoint: Path) -> None:
    prompt = torch.randint(3, VOCAB_SIZE, (LENGTH,), generator=torch.Generator().manual_seed(1))
    settings = Settings(model=str(checkpoint), dtype="float32", device="cpu", threads=1, max_num_batched_tokens=8192)
    core, info = build_engine(settings, VOCAB_SIZE, lambda share, what: None)
    assert info.max_model_len == LENGTH
    sampling = SamplingParams(max_tokens=5, seed=0, temperature=0.0, logprobs=VOCAB_SIZE)
    core.add(EngineRequest(request_id="long", prompt_token_ids=prompt.tolist(), sampling=sampling))
    outputs = []
    while core.has_work:
        outputs += core.step()
    assert not any(output.token_ids for output in outputs[:-1])  # what comes before says that the prompt has begun
    assert outputs[-1].finish_reason == "length"  # there is room for one more token, and no more
    (made,) = outputs[-1].logprobs

    AttentionInterface.register("last", attend_last)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="last")
    with torch.inference_mode():
        logits = reference(prompt[None], logits_to_keep=1).logits[0, -1]
    expected = logits.log_softmax(-1)
    assert made.token_id == int(expected.argmax())
    ours = torch.tensor([value for _, value in sorted(made.top)])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
