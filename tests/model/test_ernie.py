"""The network against transformers, an independent implementation, on tiny random models of five geometries."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig, Ernie4_5Config

from ernie_serve.kernels.cpu import CpuKernels
from ernie_serve.kernels.layout import Layout, Span
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie, Linear
from ernie_serve.model.packing import pack

COMMON = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
MOE = COMMON | {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 40, "moe_layer_start_index": 1}
GEOMETRIES = {
    "21b": Ernie4_5_MoeConfig(**MOE, moe_num_shared_experts=2, tie_word_embeddings=True),
    "300b": Ernie4_5_MoeConfig(
        **MOE | {"num_hidden_layers": 5, "moe_layer_start_index": 3},
        moe_num_shared_experts=0,
        tie_word_embeddings=False,
    ),
    "0.3b": Ernie4_5Config(**COMMON, head_dim=32, tie_word_embeddings=True),
    "interval 2": Ernie4_5_MoeConfig(**MOE, moe_num_shared_experts=1, moe_layer_interval=2, tie_word_embeddings=True),
    "explicit head_dim": Ernie4_5_MoeConfig(
        **MOE, moe_num_shared_experts=2, head_dim=24, moe_layer_end_index=2, tie_word_embeddings=False
    ),
}


@pytest.fixture(scope="module", params=list(GEOMETRIES))
def peer(request):
    return transformers_model(GEOMETRIES[request.param])


@pytest.mark.parametrize("kernels", [ReferenceKernels(), CpuKernels()], ids=["reference", "cpu"])
def test_logits_of_whole_prompts_are_those_of_transformers(peer, kernels, logits_of):
    model = ernie_like(peer, kernels)
    for seed, length in enumerate((1, 2, 17, 64)):
        ids = torch.randint(160, (length,), generator=torch.Generator().manual_seed(seed))
        expected = peer(ids[None]).logits[0]
        assert expected.abs().max() > 1  # a model whose logits are all near zero agrees with everything
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", [4093, 131072 - 16])
def test_positions_far_into_the_context_turn_as_in_transformers(start, logits_of):
    peer = transformers_model(GEOMETRIES["21b"])
    ids = torch.randint(160, (16,), generator=torch.Generator().manual_seed(start))
    positions = torch.arange(start, start + 16)
    expected = peer(ids[None], position_ids=positions[None]).logits[0]
    actual = logits_of(ernie_like(peer, CpuKernels()), ids, positions)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_bfloat16_stays_near_float32_and_keeps_the_router_in_float32(logits_of):
    peer = transformers_model(GEOMETRIES["21b"])
    model = ernie_like(peer, CpuKernels(), torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert all((dtype == torch.float32) == (".router." in name) for name, dtype in dtypes.items())
    ids = torch.arange(24)
    expected = peer(ids[None]).logits[0]
    off = (logits_of(model, ids).float() - expected).abs().mean() / expected.abs().mean()
    assert off < 0.1


@pytest.mark.parametrize("geometry", ["21b", "300b", "0.3b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_logits_of_plain_ones(geometry, dtype, logits_of):
    model = ernie_like(transformers_model(GEOMETRIES[geometry]), CpuKernels(), dtype)
    ids = torch.arange(24)
    plain = logits_of(model, ids)
    pack(model)
    packed = logits_of(model, ids)
    off = (packed.float() - plain.float()).abs().mean() / plain.float().abs().mean()
    assert off < (0.05 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("kernels", [ReferenceKernels(), CpuKernels()], ids=["reference", "cpu"])
def test_the_last_layer_computes_the_ends_alone_and_writes_what_it_writes_for_all(peer, kernels):
    """Three prompts in one step: of 5 and 9 tokens, after which something is asked, and between them one of 7."""
    model = ernie_like(peer, kernels)
    lengths, starts, total = [5, 7, 9], [0, 5, 12, 21], 21
    layout = Layout(
        positions=torch.cat([torch.arange(length) for length in lengths]),
        slots=torch.cat([16 * r + torch.arange(length) for r, length in enumerate(lengths)]),
        block_tables=torch.arange(3, dtype=torch.int32)[:, None],
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        spans=tuple(Span(starts[r], length, length) for r, length in enumerate(lengths)),
        block_size=16,
    )
    ids = torch.randint(160, (total,), generator=torch.Generator().manual_seed(3))
    K, D, dtype = model.config.num_key_value_heads, model.config.head_dim, model.norm.weight.dtype
    cache = [
        [tensor.zero_() for tensor in model.kernels.empty_cache(3, 16, K, D, dtype, torch.device("cpu"))]
        for _ in model.layers
    ]
    model(ids, layout, cache, torch.tensor([4, 20]))
    whole = [tensor.clone() for pair in cache for tensor in pair]
    model.layers[-1].mlp = mlp = Counted(model.layers[-1].mlp)
    for asked in ([0, 2], []):
        for pair in cache:
            for tensor in pair:
                tensor.zero_()
        ends = layout.ends(asked)
        logits = model(ids, layout, cache, ends.tokens, ends)
        assert len(logits) == len(asked)
        for r, made in zip(asked, logits, strict=True):
            expected = peer(ids[None, starts[r] : starts[r + 1]]).logits[0, -1]
            torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)
        for one, other in zip(whole, (tensor for pair in cache for tensor in pair), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert mlp.counts == [2]


class Counted(torch.nn.Module):
    """A module, and how many rows it was given each time."""

    def __init__(self, module):
        super().__init__()
        self.module, self.counts = module, []

    def forward(self, x, *rest):
        self.counts.append(len(x))
        return self.module(x, *rest)


def test_a_model_built_on_meta_works_once_it_is_filled(logits_of):
    peer = transformers_model(GEOMETRIES["300b"])
    with torch.device("meta"):
        model = Ernie(shape_of(peer), ReferenceKernels(), torch.float32)
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())
    model.to_empty(device="cpu")
    fill(model, peer)
    ids = torch.arange(9)
    torch.testing.assert_close(logits_of(model, ids), peer(ids[None]).logits[0], rtol=0, atol=1e-4)


def test_parameters_are_the_loaders_seam():
    with torch.device("meta"):
        model = Ernie(shape_of(transformers_model(GEOMETRIES["21b"])), ReferenceKernels(), torch.bfloat16)
    names = {
        name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith(("layers.2", "layers.3"))
    }
    assert names == {
        "embed_tokens.weight": (160, 64),
        "layers.0.input_layernorm.weight": (64,),
        "layers.0.self_attn.qkv_proj.weight": (128, 64),
        "layers.0.self_attn.o_proj.weight": (64, 64),
        "layers.0.post_attention_layernorm.weight": (64,),
        "layers.0.mlp.gate_up_proj.weight": (192, 64),
        "layers.0.mlp.down_proj.weight": (64, 96),
        "layers.1.input_layernorm.weight": (64,),
        "layers.1.self_attn.qkv_proj.weight": (128, 64),
        "layers.1.self_attn.o_proj.weight": (64, 64),
        "layers.1.post_attention_layernorm.weight": (64,),
        "layers.1.mlp.router.weight": (8, 64),
        "layers.1.mlp.router.correction_bias": (8,),
        "layers.1.mlp.experts.gate_up": (8, 80, 64),
        "layers.1.mlp.experts.down": (8, 64, 40),
        "layers.1.mlp.shared.gate_up_proj.weight": (160, 64),
        "layers.1.mlp.shared.down_proj.weight": (64, 80),
        "norm.weight": (64,),
    }


def test_no_gradient_is_kept(logits_of):
    model = ernie_like(transformers_model(GEOMETRIES["0.3b"]), ReferenceKernels())
    with torch.enable_grad():
        assert not logits_of(model, torch.arange(5)).requires_grad


def test_logits_are_made_for_the_asked_rows_only(logits_of):
    model = ernie_like(transformers_model(GEOMETRIES["21b"]), CpuKernels())
    ids = torch.arange(12)
    whole = logits_of(model, ids)
    for rows in ([11], [3, 7], []):
        some = logits_of(model, ids, rows=torch.tensor(rows, dtype=torch.int64))
        torch.testing.assert_close(some, whole[rows], rtol=0, atol=1e-5)


def transformers_model(config):
    """A random model with norms and correction biases that are not at their neutral values."""
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.copy_(1 + 0.3 * torch.randn(p.shape, generator=generator))
        elif name.endswith("e_score_correction_bias"):
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        else:
            p.copy_(torch.randn(p.shape, generator=generator) * 1.5 * p.shape[-1] ** -0.5)
    return model


def shape_of(peer):
    return ModelConfig.from_dict(peer.config.to_dict())


def ernie_like(peer, kernels, dtype=torch.float32):
    model = Ernie(shape_of(peer), kernels, dtype)
    fill(model, peer)
    return model


def fill(model, peer):
    """Copies transformers' in-memory parameters; every parameter of ours is set exactly once."""
    theirs = dict(peer.named_parameters())
    for name, p in model.named_parameters():
        p.copy_(_theirs(name, theirs).view(p.shape))


def _theirs(name, theirs):
    if name == "lm_head.weight":
        return theirs[name]
    for ours, parts in {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.items():
        if ours in name:
            return torch.cat([_theirs(name.replace(ours, part), theirs) for part in parts])
    name = name.replace(".router.correction_bias", ".gate.moe_statics.e_score_correction_bias")
    name = name.replace(".router.", ".gate.").replace(".shared.", ".shared_experts.")
    name = name.replace(".experts.gate_up", ".experts.gate_up_proj").replace(".experts.down", ".experts.down_proj")
    return theirs["model." + name]


def test_what_is_put_in_a_parameters_place_is_what_is_computed_with():
    kernels = ReferenceKernels()
    with torch.device("meta"):
        part = Linear(4, 3, kernels, torch.float32)
    part.to_empty(device="cpu")
    assert part.weight is part._parameters["weight"]
    part.weight = torch.nn.Parameter(torch.ones(3, 4), requires_grad=False)
    assert part(torch.ones(1, 4)).tolist() == [[4.0, 4.0, 4.0]]
    part.to(torch.bfloat16)
    assert part(torch.ones(1, 4).bfloat16()).dtype == torch.bfloat16
    del part.weight
    assert not hasattr(part, "weight")
