"""The formats of a GPU are made while reading and written to files, and both are what rounding the matrices gives.

Everything is on the CPU: the layout is the same on any device, and the reference kernels say what it stands for.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie_serve.errors import CheckpointError, SettingsError
from ernie_serve.kernels import fused
from ernie_serve.kernels.quantized import Format, Quantized, quantize
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.loading import load
from ernie_serve.model.quantize import bits_of, load_quantized, model_bytes, shapes_of
from ernie_serve.model.quantize_folder import quantize_folder
from ernie_serve.model.random_checkpoint import GEOMETRIES, write_random_checkpoint
from ernie_serve.model.recipes import GPU_RECIPES, Quantization, class_of, read_config
from ernie_serve.model.weights import load_weights

CPU = torch.device("cpu")
IDS = torch.arange(5, 24)
Logits = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose experts have widths that int4 can have."""
    folder = tmp_path_factory.mktemp("original") / "out"
    with pytest.MonkeyPatch.context() as patch:
        shape = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
        patch.setitem(GEOMETRIES, "tiny", GEOMETRIES["tiny"] | shape)
        write_random_checkpoint(folder, "tiny")
    return folder


def empty_model(folder: Path) -> Ernie:
    with torch.device("meta"):
        return Ernie(ModelConfig.from_folder(folder), ReferenceKernels(), torch.float32)


def matrices(model: Ernie, names: list[str]) -> dict[str, Quantized]:
    found = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        found[name] = getattr(model.get_submodule(path), attribute)
        assert isinstance(found[name], Quantized)
    return found


@pytest.mark.parametrize("recipe", GPU_RECIPES)
def test_what_is_written_is_what_loading_makes_and_what_rounding_gives(
    recipe: str, original: Path, tmp_path: Path, logits_of: Logits
) -> None:
    quantization = Quantization.of(recipe, "cuda")
    out = tmp_path / "out"
    written = quantize_folder(original, out, quantization, shard_bytes=300_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    plain, made, read = empty_model(original), empty_model(original), empty_model(out)
    load_weights(plain, original)
    load_quantized(made, original, quantization)
    load(read, out, None, device=CPU)
    names = list(bits_of(shapes_of(plain), quantization))
    assert {class_of(name) for name in names} == set(GPU_RECIPES[recipe])
    assert written == model_bytes(shapes_of(plain), quantization, torch.bfloat16)
    ours, theirs = matrices(made, names), matrices(read, names)
    for name in names:
        expected = quantize(plain.get_parameter(name).detach().bfloat16(), quantization.bits[class_of(name)])
        for matrix in (ours[name], theirs[name]):
            assert matrix.format == expected.format
            assert torch.equal(matrix.data.view(torch.uint8), expected.data.view(torch.uint8))
            assert torch.equal(matrix.scales, expected.scales)
        plain.get_parameter(name).data = expected.dequantized()
    assert torch.equal(logits_of(made, IDS), logits_of(read, IDS))
    torch.testing.assert_close(logits_of(made, IDS), logits_of(plain, IDS))
    size = sum(each.nbytes for each in ours.values()) + sum(each.nbytes for each in made.parameters())
    assert model_bytes(shapes_of(plain.to("meta")), quantization, torch.float32) == size


def test_the_config_says_which_layout_it_is_and_is_understood(original: Path, tmp_path: Path) -> None:
    quantize_folder(original, tmp_path / "out", Quantization.of("fp8", "cuda"))
    entry = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert entry == {
        "quant_method": "ernie_serve",
        "format_version": 2,
        "device": "cuda",
        "recipe": "fp8",
        "group_size": 64,
        "formats": {"experts": "fp8", "shared": "fp8", "attention": "fp8", "dense": "fp8"},
    }
    assert read_config(entry) == Quantization.of("fp8", "cuda")
    only_experts = entry | {"formats": {"experts": "fp8", "shared": "fp8"}}
    found = read_config(only_experts)
    assert isinstance(found, Quantization), "as versions wrote it that kept all else plain"
    assert found.bits == only_experts["formats"]
    for change, said in (
        ({"formats": {"head": "fp8"}}, "attention, dense, shared, experts have one of"),
        ({"formats": {"attention": "int4"}}, "int4 only experts and shared"),
        ({"formats": {"experts": 8}}, "fp8"),
        ({"recipe": "int3"}, "int3"),
        ({"device": "cpu"}, "format_version 2 for 'cpu'"),
    ):
        assert said in str(read_config(entry | change))


def test_nothing_is_compiled_to_write_for_a_gpu(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "operators", lambda: pytest.fail("not needed"))
    quantize_folder(original, tmp_path / "out", Quantization.of("int8", "cuda"))


def test_files_of_another_format_than_the_config_says_are_refused(original: Path, tmp_path: Path) -> None:
    quantize_folder(original, tmp_path / "out", Quantization.of("fp8", "cuda"))
    path = tmp_path / "out/config.json"
    path.write_text(path.read_text().replace('"fp8"', '"int8"'))
    with pytest.raises(CheckpointError, match=r"is F8_E4M3 .* instead of I8 .*Quantize the original checkpoint again"):
        load(empty_model(path.parent), path.parent, None, device=CPU)


def test_experts_too_narrow_for_int4_are_refused_before_anything_is_read(packable_checkpoint: Path) -> None:
    model = empty_model(packable_checkpoint)
    with pytest.raises(SettingsError, match=r"experts\.gate_up.* 64 columns.*multiple of 128.*--quantization int8"):
        load_quantized(model, packable_checkpoint, Quantization.of("int4", "cuda"))
    assert all(parameter.is_meta for parameter in model.parameters())
    load_quantized(model, packable_checkpoint, Quantization.of("int8", "cuda"))


def test_rounding_takes_one_matrix_at_a_time_beside_the_model(original: Path) -> None:
    """The only tensors that are as large as a stack are the stacks themselves."""
    quantization = Quantization.of("int4", "cuda")
    shapes = shapes_of(empty_model(original))
    seen: list[torch.Size] = []

    def recorded(name: str, matrix: torch.Tensor, form: Format) -> Quantized:
        seen.append(matrix.shape)
        return quantize(matrix, form)

    load_quantized(empty_model(original), original, quantization, quantize=recorded)
    stacks = [shape for name, shape in shapes.items() if class_of(name) == "experts"]
    assert set(seen) >= {shape[1:] for shape in stacks}
    assert all(len(shape) == 2 for shape in seen)
    alone = [name for name in bits_of(shapes, quantization) if class_of(name) != "experts"]
    assert len(seen) == sum(shape[0] for shape in stacks) + len(alone)
