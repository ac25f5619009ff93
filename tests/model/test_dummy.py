"""Weights by chance take the way of real ones: every parameter is filled, and no two alike."""

import pytest
import torch

from ernie_serve.errors import SettingsError
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.loading import load, quantization_of
from ernie_serve.model.random_checkpoint import GEOMETRIES, write_random_checkpoint

CPU = torch.device("cpu")


def loaded(folder, recipe=None):
    config = ModelConfig.from_folder(folder)
    with torch.device("meta"):
        model = Ernie(config, ReferenceKernels())
    load(model, folder, quantization_of(config, recipe, CPU), device=CPU, dummy=True)
    return model


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Wide enough for packed rows."""
    shape = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 192}
    monkeypatch.setitem(GEOMETRIES, "tiny", GEOMETRIES["tiny"] | shape)


@pytest.fixture
def folder(wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dummy") / "tiny"
    write_random_checkpoint(folder, "tiny", has_weights=False)
    assert not list(folder.glob("*.safetensors"))
    return folder


def test_every_parameter_is_filled_and_no_matrix_is_like_another(folder):
    parameters = dict(loaded(folder).named_parameters())
    matrices = {name: p.float() for name, p in parameters.items() if p.dim() > 1}
    assert all((p == 1).all() for name, p in parameters.items() if "norm" in name)
    assert all((p == 0).all() for name, p in parameters.items() if "bias" in name)
    assert all(0.015 < p.std() < 0.025 for p in matrices.values())
    assert len({tuple(p.flatten()[:16].tolist()) for p in matrices.values()}) == len(matrices)
    experts = matrices["layers.1.mlp.experts.down"]
    assert len({tuple(expert.flatten()[:16].tolist()) for expert in experts}) == len(experts)


def test_it_is_quantized_as_it_is_made(folder):
    weight = loaded(folder, "int8").layers[1].self_attn.qkv_proj.weight
    assert not isinstance(weight, torch.Tensor)


def test_a_quantized_folder_has_no_dummy_weights(tmp_path):
    write_random_checkpoint(tmp_path / "packed", "tiny", recipe="int8")
    with pytest.raises(SettingsError, match="--load-format dummy: this checkpoint is quantized"):
        loaded(tmp_path / "packed")
