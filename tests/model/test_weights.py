"""Both published layouts fill the model, and nothing wrong is let in."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie_serve.errors import CheckpointError
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.model import placing
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.placing import Place
from ernie_serve.model.random_checkpoint import write_random_checkpoint
from ernie_serve.model.safetensors_file import StoredTensor
from ernie_serve.model.weights import load_weights

GEOMETRIES = ["21b-like", "300b-like", "0.3b-like", "interval-2", "head-dim"]
Tensors = dict[str, torch.Tensor]


def empty_model(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Ernie:
    with torch.device("meta"):
        return Ernie(ModelConfig.from_folder(folder), ReferenceKernels(), dtype)


def loaded(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    model = empty_model(folder, dtype)
    load_weights(model, folder)
    return dict(model.state_dict())


@pytest.fixture
def edited(tiny_checkpoint: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], Any]], Path]:
    """A copy of the tiny checkpoint whose tensors were changed."""

    def edit(change: Callable[[Tensors], Any]) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(tiny_checkpoint, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return edit


def test_parameters_are_bit_for_bit_what_transformers_loads(every_checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(every_checkpoint).state_dict()
    ours = loaded(every_checkpoint)
    seen = set()
    for name, tensor in ours.items():
        theirs = "model." + name if name != "lm_head.weight" else name
        if name.endswith("qkv_proj.weight"):
            expected = torch.cat([reference.pop(theirs.replace("qkv", part)) for part in "qkv"])
        elif "experts" in name:
            expected = reference.pop(theirs + "_proj")
        elif name.endswith("gate_up_proj.weight"):
            theirs = theirs.replace("shared", "shared_experts")
            expected = torch.cat([reference.pop(theirs.replace("gate_up", part)) for part in ("gate", "up")])
        elif name.endswith("router.correction_bias"):
            expected = reference.pop(theirs.replace("router.", "gate.moe_statics.e_score_"))[0]
        else:
            expected = reference.pop(theirs.replace("router", "gate").replace("shared", "shared_experts"))
        assert tensor.dtype == (torch.float32 if "router" in name else torch.bfloat16), name
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
        seen.add(name)
    reference.pop("lm_head.weight", None)
    assert not reference
    assert seen == set(ours)


@pytest.mark.parametrize("block_bytes", [1000, placing.BLOCK_BYTES])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_both_layouts_give_the_same_parameters(
    geometry: str, block_bytes: int, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "BLOCK_BYTES", block_bytes)
    torch_way, paddle_way = loaded(make_checkpoint(geometry)), loaded(make_checkpoint(geometry, layout="paddle"))
    assert torch_way.keys() == paddle_way.keys()
    assert all(torch.equal(torch_way[name], paddle_way[name]) for name in torch_way)


def test_shards_give_the_same_parameters_as_one_file(make_checkpoint: Callable[..., Path]) -> None:
    sharded = make_checkpoint("21b-like", shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, pieces = loaded(make_checkpoint("21b-like")), loaded(sharded)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


@pytest.mark.parametrize("block_bytes", [100, 1000, placing.BLOCK_BYTES])
@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_weights_are_converted_to_the_models_dtype_in_blocks_of_any_size(
    layout: str, block_bytes: int, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint("21b-like", layout=layout)
    monkeypatch.setattr(placing, "BLOCK_BYTES", block_bytes)
    as_stored, converted = loaded(make_checkpoint("21b-like")), loaded(folder, torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in converted.values())
    assert all(torch.equal(as_stored[name].float(), converted[name]) for name in as_stored)


def test_a_model_that_has_memory_keeps_it(tiny_checkpoint: Path) -> None:
    model = Ernie(ModelConfig.from_folder(tiny_checkpoint), ReferenceKernels())
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    load_weights(model, tiny_checkpoint)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert torch.equal(model.norm.weight, loaded(tiny_checkpoint)["norm.weight"])


def test_progress_only_grows_and_ends_at_one(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("21b-like", shard_size="100KB")
    heard: list[tuple[float, str]] = []
    load_weights(empty_model(folder), folder, lambda share, what: heard.append((share, what)))
    shares = [share for share, _ in heard]
    assert shares == sorted(set(shares))
    assert len(shares) > 10
    assert shares[-1] == 1.0
    assert {what for _, what in heard} == {f"reading {path.name}" for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    "name", ["model.mtp_block.0.norm.weight", "model.resampler_model.x", "model.layers.1.mlp.gate.weight_1"]
)
def test_prediction_and_vision_tensors_are_skipped(
    name: str, edited: Callable[..., Path], tiny_checkpoint: Path
) -> None:
    folder = edited(lambda tensors: tensors.update({name: torch.zeros(3)}))
    assert torch.equal(loaded(folder)["norm.weight"], loaded(tiny_checkpoint)["norm.weight"])


def test_every_missing_tensor_is_named_or_counted(edited: Callable[..., Path]) -> None:
    def drop(tensors: Tensors) -> None:
        for expert in range(6):
            del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]

    with pytest.raises(
        CheckpointError, match=r"missing tensors \(6\): model\.layers\.1\.mlp\.experts\.0\.up_proj.* and 2 more"
    ):
        loaded(edited(drop))


def test_an_unexpected_tensor_is_named(edited: Callable[..., Path]) -> None:
    folder = edited(lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"unexpected tensors \(1\): model\.layers\.3\.mlp\.up_proj\.weight"):
        loaded(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(edited: Callable[..., Path]) -> None:
    folder = edited(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[32\] instead of \[64\]"):
        loaded(folder)


def test_a_correction_bias_with_a_second_row_is_refused(edited: Callable[..., Path]) -> None:
    name = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    with pytest.raises(CheckpointError, match=r"correction_bias is \[2, 8\] instead of \[1, 8\]"):
        loaded(edited(lambda tensors: tensors.update({name: torch.zeros(2, 8)})))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.uint16])
def test_a_dtype_that_is_not_a_weights_is_named(dtype: torch.dtype, edited: Callable[..., Path]) -> None:
    folder = edited(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64).to(dtype)}))
    with pytest.raises(CheckpointError, match=r"dtype other than BF16, F16, F32 \(1\): model\.norm\.weight is [FU]"):
        loaded(folder)


def test_a_checkpoint_of_another_family_is_refused(edited: Callable[..., Path]) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors["transformer." + name] = tensors.pop(name)

    with pytest.raises(CheckpointError, match="no known layout"):
        loaded(edited(rename))


def test_a_mixture_of_both_layouts_is_refused(edited: Callable[..., Path]) -> None:
    folder = edited(lambda tensors: tensors.update({"ernie.norm.weight": tensors.pop("model.norm.weight")}))
    with pytest.raises(CheckpointError, match="both layouts"):
        loaded(folder)


def test_a_stored_copy_of_a_tied_head_is_accepted(edited: Callable[..., Path], tiny_checkpoint: Path) -> None:
    folder = edited(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert loaded(folder).keys() == loaded(tiny_checkpoint).keys()


@pytest.mark.parametrize(
    "change", [lambda head: head.add_(1), lambda head: head.float(), lambda head: head.double(), lambda head: head[:9]]
)
def test_a_tied_head_that_differs_is_refused(change: Callable[..., torch.Tensor], edited: Callable[..., Path]) -> None:
    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"].clone()).clone()

    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        loaded(edited(add))


def test_an_untied_head_that_is_absent_is_missing(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "untied"
    shutil.copytree(make_checkpoint("21b-like"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing tensors \(1\): lm_head\.weight"):
        loaded(folder)


def test_nothing_is_read_when_a_header_is_wrong(edited: Callable[..., Path]) -> None:
    folder = edited(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32)}))
    touched: list[Place] = []

    def put(place: Place, stored: StoredTensor, dtype: torch.dtype) -> None:
        touched.append(place)

    with pytest.raises(CheckpointError):
        load_weights(empty_model(folder), folder, put=put)
    assert not touched


def test_whoever_keeps_weights_in_another_form_is_handed_each_tensor(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("21b-like", layout="paddle")
    model = empty_model(folder)
    expected = loaded(folder)
    filled = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}

    def put(place: Place, stored: StoredTensor, dtype: torch.dtype) -> None:
        view = place.view(filled[place.parameter])
        for first, rows in stored.blocks(dtype, torch.empty(1000, dtype=torch.uint8)):
            view[first : first + len(rows)] = rows

    load_weights(model, folder, put=put)
    assert all(torch.equal(filled[name], expected[name]) for name in expected)
    assert all(tensor.is_meta for tensor in model.parameters())


def test_a_failure_while_reading_ends_the_loading_and_its_threads(tiny_checkpoint: Path) -> None:
    def put(place: Place, stored: StoredTensor, dtype: torch.dtype) -> None:
        raise CheckpointError("the disk is gone")

    with pytest.raises(CheckpointError, match="the disk is gone"):
        load_weights(empty_model(tiny_checkpoint), tiny_checkpoint, put=put)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_loading_takes_little_memory_beside_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    write_random_checkpoint(folder, "0.3b", layers=1, shard_bytes=10**8)
    program = """
import re, sys, torch
from pathlib import Path
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.model import placing
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.placing import Place
from ernie_serve.model.weights import load_weights

def load(folder, dtype):
    with torch.device("meta"):
        model = Ernie(ModelConfig.from_folder(folder), ReferenceKernels(), dtype)
    load_weights(model, folder)
    return model

peak = lambda: int(re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())[1]) * 1024
load(Path(sys.argv[1]), torch.bfloat16)
before = peak()
model = load(Path(sys.argv[2]), getattr(torch, sys.argv[3]))
print(peak() - before, sum(tensor.nbytes for tensor in model.parameters()))
"""
    warm = tmp_path / "warm"
    write_random_checkpoint(warm)
    for dtype in ("bfloat16", "float32"):
        command = [sys.executable, "-c", program, str(warm), str(folder), dtype]
        grown, size = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        assert size > 200e6
        assert 0.9 * size < grown < size + 100e6
