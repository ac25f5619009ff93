"""A model whose experts were quantized while loading says through the kernels of a GPU what it says in plain torch."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ernie_serve.kernels.cuda import CudaKernels
from ernie_serve.kernels.layout import Layout, Span
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.quantize import load_quantized
from ernie_serve.model.random_checkpoint import GEOMETRIES, write_random_checkpoint
from ernie_serve.model.recipes import Quantization


def test_loaded_experts_are_read_as_the_reference_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    monkeypatch.setitem(GEOMETRIES, "tiny", GEOMETRIES["tiny"] | shape | {"moe_num_experts": 4, "moe_k": 2})
    write_random_checkpoint(tmp_path / "out", "tiny")
    config = ModelConfig.from_folder(tmp_path / "out")
    spans = (Span(0, 3, 3),)
    layout = Layout(
        positions=torch.arange(3),
        slots=torch.arange(3),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        query_starts=torch.tensor([0, 3], dtype=torch.int32),
        context_lens=torch.tensor([3], dtype=torch.int32),
        spans=spans,
        block_size=16,
    )
    found = []
    for kernels in (ReferenceKernels(), CudaKernels()):
        with torch.device("meta"):
            model = Ernie(config, kernels, torch.float32)
        load_quantized(model, tmp_path / "out", Quantization.of("mixed", "cuda"))
        heads = (config.num_key_value_heads, config.head_dim)
        cache = [kernels.empty_cache(1, 16, *heads, torch.float32, torch.device("cpu")) for _ in model.layers]
        with torch.inference_mode():
            found.append(model(torch.tensor([5, 6, 7]), layout, cache, torch.arange(3)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
