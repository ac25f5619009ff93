"""An index and its files agree, or loading says how they do not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ernie_serve.errors import CheckpointError
from ernie_serve.model.shards import Shards

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint in shards."""
    return shutil.copytree(make_checkpoint("21b-like", shard_size="100KB"), tmp_path / "sharded")


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_shards_are_opened_in_order_with_all_their_tensors(folder: Path) -> None:
    with Shards(folder) as shards:
        files = [tensor.file.path.name for tensor in shards.tensors.values()]
        assert files == sorted(files)
        assert shards.tensors.keys() == json.loads((folder / INDEX).read_text())["weight_map"].keys()


def test_a_single_file_needs_no_index(tiny_checkpoint: Path) -> None:
    with Shards(tiny_checkpoint) as shards:
        assert shards.tensors.keys() == load_file(tiny_checkpoint / "model.safetensors").keys()


def test_an_absent_shard_is_named_before_any_is_opened(folder: Path) -> None:
    second = sorted(folder.glob("*.safetensors"))[1]
    second.unlink()
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"names 1 of .* files that are not there: {second.name}"):
        Shards(folder)


def test_a_tensor_that_its_shard_lacks_is_named(folder: Path) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(first)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, first)
    with pytest.raises(CheckpointError, match=f"{first.name} lacks 1 tensors that the index lists there: {name}"):
        Shards(folder)


def test_a_tensor_in_two_shards_is_named(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    with pytest.raises(CheckpointError, match=f"{second.name} repeats tensors of another shard: {name}"):
        Shards(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "pytorch_model.bin"])
def test_an_index_cannot_name_a_file_elsewhere(file: str, folder: Path) -> None:
    edit_index(folder, lambda where: where.update({"model.norm.weight": file}))
    with pytest.raises(CheckpointError, match=f"names '{file}'"):
        Shards(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_an_index_without_a_weight_map_is_refused(text: str, folder: Path) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json has no `weight_map`"):
        Shards(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 200000])
def test_an_index_that_is_no_json_is_refused(content: bytes, folder: Path) -> None:
    (folder / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        Shards(folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model_state.pdparams"])
def test_pickled_weights_are_named_and_not_read(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=f"{file}, which are not read: only safetensors"):
        Shards(tmp_path)


def test_an_empty_folder_is_said_to_be_empty_of_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json\.$"):
        Shards(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        Shards(tmp_path / "nowhere")
