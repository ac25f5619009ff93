"""A random checkpoint is a whole folder that transformers and we read alike."""

import errno
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from ernie_serve.errors import CheckpointError
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.model import random_checkpoint
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.new_folder import new_folder
from ernie_serve.model.quantize import parameter_shapes
from ernie_serve.model.random_checkpoint import GEOMETRIES, Geometry, write_random_checkpoint
from ernie_serve.model.weights import load_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "tiny"
    write_random_checkpoint(folder, "tiny", seed=3)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_folder_has_all_that_serving_reads(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }


def test_it_loads(folder: Path) -> None:
    model = Ernie(ModelConfig.from_folder(folder), ReferenceKernels())
    load_weights(model, folder)
    assert all(torch.isfinite(tensor).all() for tensor in model.parameters())


def test_transformers_finds_every_tensor_it_wants(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())


def test_transformers_renders_and_encodes_a_chat(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    messages += [
        {"role": "assistant", "content": "b"},
        {"role": "tool", "content": "x"},
        {"role": "user", "content": "c"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin_of_sentence|>S\nUser: a\nAssistant: b<|end_of_sentence|>User: c\nAssistant: "
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_same_seed_is_the_same_checkpoint_and_another_is_not(folder: Path, tmp_path: Path) -> None:
    for seed in (3, 4):
        write_random_checkpoint(tmp_path / str(seed), "tiny", seed)
    assert (tmp_path / "3/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    first, second = tensors(folder), tensors(tmp_path / "4")
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_fewer_layers_are_the_first_of_more_and_shards_change_nothing(folder: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, "tiny", 3, layers=2, shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(tmp_path).values())
    whole, part = tensors(folder), tensors(tmp_path)
    assert index["weight_map"].keys() == part.keys() < whole.keys()
    assert all(torch.equal(part[name], whole[name]) for name in part)
    load_weights(Ernie(ModelConfig.from_folder(tmp_path), ReferenceKernels()), tmp_path)


def write_weights(folder: Path, threads: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    shapes = parameter_shapes(ModelConfig.from_dict(GEOMETRIES["tiny"]))
    random_checkpoint._write_weights(folder, shapes, 3, "bfloat16", 50_000, "cpu", threads)
    return sorted(folder.iterdir())


def test_several_threads_write_the_same_files_as_one(tmp_path: Path) -> None:
    one, four = write_weights(tmp_path / "one", 1), write_weights(tmp_path / "four", 4)
    assert len(one) > 9
    assert [path.name for path in one] == [path.name for path in four]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in four]


@pytest.mark.parametrize("threads", [1, 4])
def test_a_full_disk_is_told_whoever_writes(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def write(path: Path, *_: Any) -> None:
        tried.append(path.name)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(random_checkpoint, "write_safetensors", write)
    with (
        pytest.raises(CheckpointError, match="No space left on device"),
        new_folder(tmp_path / "new") as new,
    ):
        write_weights(new, threads)
    assert not list(tmp_path.iterdir())
    assert "model-00001" in tried[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_router_is_float32_and_the_rest_as_asked(dtype: Any, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, "tiny", layers=2, dtype=dtype)
    router = ("mlp.gate.weight", "e_score_correction_bias")
    for name, tensor in tensors(tmp_path).items():
        assert tensor.dtype == (torch.float32 if name.endswith(router) else getattr(torch, dtype)), name
    assert ModelConfig.from_folder(tmp_path).dtype == dtype


def test_every_expert_gets_a_fair_part(folder: Path) -> None:
    stored = tensors(folder)
    gate, bias = (
        stored[f"model.layers.1.mlp.{name}"] for name in ("gate.weight", "moe_statics.e_score_correction_bias")
    )
    x = torch.randn(2000, gate.shape[1], generator=torch.Generator().manual_seed(0))
    chosen = (torch.softmax(x @ gate.T, dim=-1) + bias[0]).topk(GEOMETRIES["tiny"]["moe_k"]).indices
    shares = chosen.flatten().bincount(minlength=len(gate)) / chosen.numel() * len(gate)
    assert shares.min() > 0.3
    assert shares.max() < 3
    assert bias.abs().min() > 0


@pytest.mark.parametrize(
    ("geometry", "count"), [("0.3b", 360_748_032), ("21b", 21_825_437_888), ("300b", 299_484_163_264)]
)
def test_geometries_have_the_published_number_of_parameters(geometry: Geometry, count: int) -> None:
    shapes = parameter_shapes(ModelConfig.from_dict(GEOMETRIES[geometry]))
    assert sum(shape.numel() for shape in shapes.values()) == count


def test_an_unknown_geometry_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no geometry '7b'; choose one of tiny, 0\.3b, 21b, 300b"):
        write_random_checkpoint(tmp_path, cast("Geometry", "7b"))


def test_a_folder_with_something_in_it_is_left_alone(folder: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(CheckpointError, match="is not empty"):
        write_random_checkpoint(folder, "tiny")
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="file/new cannot be written"):
        write_random_checkpoint(tmp_path / "file/new")


def test_a_write_that_is_cut_off_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(vocab_size: int) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(random_checkpoint, "random_tokenizer", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_random_checkpoint(tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", [0, -1])
def test_no_layers_are_too_few(layers: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        write_random_checkpoint(tmp_path, "tiny", layers=layers)


def test_a_gpu_that_is_not_there_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CheckpointError, match="sees no GPU"):
        write_random_checkpoint(tmp_path / "new", "tiny", device="cuda")


def test_a_gpu_makes_plain_weights_only(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="plain weights only"):
        write_random_checkpoint(tmp_path / "new", "tiny", recipe="int8", device="cuda")
