"""The whole network, a token at a time: what it says through the kernels of one row is what it says in plain torch."""

import pytest
import torch

pytest.importorskip("triton")

from ernie_serve.kernels.fused_cuda import FusedCudaKernels
from ernie_serve.kernels.layout import Layout, Span
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.kernels.triton import experts_of_one, one_row
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.quantize import load_quantized
from ernie_serve.model.random_checkpoint import GEOMETRIES, write_random_checkpoint
from ernie_serve.model.recipes import Quantization
from ernie_serve.model.weights import load_weights
from ernie_serve.worker.self_check import check_one_row

SHAPE = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("geometry", "recipe"),
    [*(("tiny", recipe) for recipe in (None, "int8", "int4", "mixed")), ("0.3b", None), ("0.3b", "int8")],
)
def test_three_tokens_one_after_the_other(tmp_path, monkeypatch, geometry, recipe):
    small = {"vocab_size": 1000, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    shape = SHAPE | (small if geometry == "0.3b" else {"moe_num_experts": 4, "moe_k": 2})
    monkeypatch.setitem(GEOMETRIES, geometry, GEOMETRIES[geometry] | shape)
    write_random_checkpoint(tmp_path / "out", geometry)
    config = ModelConfig.from_folder(tmp_path / "out")
    found = []
    for kernels in (ReferenceKernels(), FusedCudaKernels()):
        with torch.device("meta"):
            model = Ernie(config, kernels, torch.float32)
        if recipe:
            load_quantized(model, tmp_path / "out", Quantization.of(recipe, "cuda"))
        else:
            load_weights(model, tmp_path / "out")
        heads = config.num_key_value_heads, config.head_dim
        cache = [kernels.empty_cache(1, 16, *heads, torch.float32, torch.device("cpu")) for _ in model.layers]
        with torch.inference_mode():
            for at, token in enumerate((5, 6, 7)):
                layout = Layout(
                    positions=torch.tensor([at]),
                    slots=torch.tensor([at]),
                    block_tables=torch.zeros(1, 1, dtype=torch.int32),
                    query_starts=torch.tensor([0, 1], dtype=torch.int32),
                    context_lens=torch.tensor([at + 1], dtype=torch.int32),
                    spans=(Span(0, 1, at + 1),),
                    block_size=16,
                )
                found.append(model(torch.tensor([token]), layout, cache, torch.tensor([0])))
    for want, got in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_a_start_leaves_them_out_where_they_fail(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(GEOMETRIES, "tiny", GEOMETRIES["tiny"] | SHAPE | {"moe_num_experts": 4, "moe_k": 2})
    write_random_checkpoint(tmp_path / "out", "tiny")
    config, kernels = ModelConfig.from_folder(tmp_path / "out"), FusedCudaKernels()
    with torch.device("meta"):
        model = Ernie(config, kernels, torch.float32)
    load_weights(model, tmp_path / "out")
    heads = config.num_key_value_heads, config.head_dim
    cache = [kernels.empty_cache(1, 16, *heads, torch.float32, torch.device("cpu")) for _ in model.layers]
    check_one_row(model, kernels, cache, 16)
    assert kernels.fuses

    def fails(*args, **named):
        raise RuntimeError("out of resource")

    for module, name in (
        (one_row, "linear"),
        (one_row, "linear_and_turn"),
        (one_row, "add_linear"),
        (one_row, "scores"),
        (experts_of_one, "experts_of_one"),
    ):
        monkeypatch.setattr(module, name, fails)
    check_one_row(model, kernels, cache, 16)
    assert "RuntimeError: out of resource" in caplog.text
    assert not kernels.fuses
    caplog.clear()
    check_one_row(model, kernels, cache, 16)
    assert not caplog.records, "none of them is taken any more"
