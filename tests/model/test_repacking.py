"""Where nothing can be compiled, a quantized model is repacked matrix by matrix, and says what it says elsewhere."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie_serve.kernels import fused, native, nibbles
from ernie_serve.kernels.cpu import CpuKernels
from ernie_serve.kernels.fused import FusedCpuKernels
from ernie_serve.kernels.nibbles import Nibbles
from ernie_serve.kernels.packed import Packed
from ernie_serve.kernels.quantized import Quantized
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.loading import load
from ernie_serve.model.packing import matrices
from ernie_serve.model.quantize import bits_of, model_bytes, repacking_bytes, shapes_of
from ernie_serve.model.quantize_folder import quantize_folder
from ernie_serve.model.random_checkpoint import GEOMETRIES, write_random_checkpoint
from ernie_serve.model.recipes import RECIPES, Quantization

CPU = torch.device("cpu")
IDS = torch.arange(5, 24)
Logits = Callable[..., torch.Tensor]

pytestmark = pytest.mark.skipif(not nibbles.available(), reason="this torch has no 4-bit product")


@pytest.fixture(scope="module")
def folders(packable_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A quantized folder of each recipe."""
    found = {}
    for recipe in RECIPES:
        found[recipe] = tmp_path_factory.mktemp(recipe) / "out"
        quantize_folder(packable_checkpoint, found[recipe], Quantization.of(recipe))
    return found


def loaded(folder: Path, kernels: ReferenceKernels, recipe: str | None = None) -> Ernie:
    with torch.device("meta"):
        model = Ernie(ModelConfig.from_folder(folder), kernels, torch.float32)
    load(model, folder, Quantization.of(recipe) if recipe else None, device=CPU)
    return model


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def of(model: Ernie, name: str) -> object:
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_are_those_of_the_numbers_that_the_bits_stand_for(
    recipe: str, folders: dict[str, Path], logits_of: Logits
) -> None:
    model = loaded(folders[recipe], CpuKernels())
    expected = logits_of(loaded(folders[recipe], ReferenceKernels()), IDS)
    assert distance(logits_of(model, IDS), expected) < 0.02
    for name in matrices(model):
        assert isinstance(of(model, name), Nibbles)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_are_near_those_of_the_compiled_operators(
    recipe: str, folders: dict[str, Path], logits_of: Logits
) -> None:
    if (ops := native.operators()) is None:
        pytest.skip("no C++ compiler")
    compiled = logits_of(loaded(folders[recipe], FusedCpuKernels(ops)), IDS)
    assert distance(logits_of(loaded(folders[recipe], CpuKernels()), IDS), compiled) < 0.04


def test_a_mapped_folder_and_quantizing_while_loading_give_the_same(
    packable_layouts: list[Path], tmp_path: Path, logits_of: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "operators", lambda: None)
    first, *others = (logits_of(loaded(folder, CpuKernels(), "mixed"), IDS) for folder in packable_layouts)
    assert others
    assert all(torch.equal(first, other) for other in others)
    quantize_folder(packable_layouts[0], tmp_path / "out", Quantization.of("mixed"))
    assert torch.equal(logits_of(loaded(tmp_path / "out", CpuKernels()), IDS), first)


def test_nothing_of_a_repacked_folder_stays_mapped(folders: dict[str, Path]) -> None:
    model = loaded(folders["int4"], CpuKernels())
    assert isinstance(model.embed_tokens.weight, Packed)
    assert str(folders["int4"]) not in Path("/proc/self/maps").read_text()


def test_the_formats_of_a_gpu_are_left_as_they_are(packable_checkpoint: Path) -> None:
    with torch.device("meta"):
        model = Ernie(ModelConfig.from_folder(packable_checkpoint), CpuKernels(), torch.float32)
    quantization = Quantization.of("int8", "cuda")
    names = list(bits_of(shapes_of(model), quantization))
    load(model, packable_checkpoint, quantization, device=CPU)
    assert names
    assert all(isinstance(of(model, name), Quantized) for name in names)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_size_is_known_from_the_shapes(
    recipe: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 192, "tie_word_embeddings": tied}
    monkeypatch.setitem(GEOMETRIES, "tiny", GEOMETRIES["tiny"] | widths)
    write_random_checkpoint(tmp_path / "out", "tiny", recipe=recipe)
    with torch.device("meta"):
        empty = Ernie(ModelConfig.from_folder(tmp_path / "out"), CpuKernels(), torch.float32)
    shapes, quantization = shapes_of(empty), Quantization.of(recipe)
    model = loaded(tmp_path / "out", CpuKernels())
    found = [of(model, name) for name in (*matrices(model), "embed_tokens.weight", "embed_tokens.head")]
    size = sum(each.nbytes for each in found if each is not None) + sum(
        parameter.nbytes for parameter in model.parameters()
    )
    assert model_bytes(shapes, quantization, torch.float32) + repacking_bytes(shapes, quantization) == size
    assert (model.embed_tokens.head is not None) == tied


@pytest.mark.parametrize("recipe", [None, "int4"])
def test_no_more_than_a_few_matrices_are_there_twice(
    recipe: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"hidden_size": 512, "moe_intermediate_size": 512, "intermediate_size": 512, "num_hidden_layers": 3}
    monkeypatch.setitem(GEOMETRIES, "tiny", GEOMETRIES["tiny"] | shape | {"moe_num_experts": 48})
    stored = None if recipe else "int4"
    write_random_checkpoint(tmp_path / "large", "tiny", recipe=stored)
    monkeypatch.setitem(GEOMETRIES, "tiny", GEOMETRIES["tiny"] | shape | {"moe_num_experts": 8})
    write_random_checkpoint(tmp_path / "warm", "tiny", recipe=stored)
    program = r"""
import re, sys, torch
from pathlib import Path
from ernie_serve.kernels import packed
from ernie_serve.kernels.cpu import CpuKernels
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.loading import load
from ernie_serve.model.quantize import model_bytes, repacking_bytes, shapes_of
from ernie_serve.model.recipes import Quantization

class Kernels(CpuKernels):
    def quantize(self, weight, bits, search=True):
        return packed.quantize(weight, bits, False)

def filled(folder, recipe):
    with torch.device("meta"):
        model = Ernie(ModelConfig.from_folder(Path(folder)), Kernels(), torch.float32)
    shapes, int4 = shapes_of(model), Quantization.of("int4")
    load(model, Path(folder), int4 if recipe else None, device=torch.device("cpu"))
    size = model_bytes(shapes, int4, torch.float32) + repacking_bytes(shapes, int4)
    return model, size, model_bytes(shapes, None, torch.bfloat16)

def peak():  # getrusage would count what the parent had
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

filled(sys.argv[1], sys.argv[3])
before = peak()
model, size, whole = filled(sys.argv[2], sys.argv[3])
print(peak() - before, size, whole)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "warm"), str(tmp_path / "large"), recipe or ""]
    grown, size, whole = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert whole > 3 * size
    assert grown < size + whole / 5
