"""A quantized folder is written whole or not at all, read back bit for bit, mapped, and checked before it is used."""

import errno
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ernie_serve.errors import CheckpointError, SettingsError
from ernie_serve.kernels.fused import cpu_kernels
from ernie_serve.kernels.packed import Packed, unpack
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.model import new_folder, quantize_folder
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.quantize import bits_of, load_quantized, shapes_of
from ernie_serve.model.quantized_files import ALIGNMENT, load_mapped
from ernie_serve.model.random_checkpoint import GEOMETRIES, write_random_checkpoint
from ernie_serve.model.recipes import Quantization

IDS = torch.arange(5, 24)
MIXED = Quantization.of("mixed")
Logits = Callable[..., torch.Tensor]


def empty_model(folder: Path) -> Ernie:
    with torch.device("meta"):
        return Ernie(ModelConfig.from_folder(folder), ReferenceKernels(), torch.float32)


def mapped(folder: Path) -> Ernie:
    model = empty_model(folder)
    assert model.config.quantization is not None
    load_mapped(model, folder, model.config.quantization)
    return model


def packed_of(model: Ernie, name: str) -> Packed:
    path, _, attribute = name.rpartition(".")
    found: Packed = getattr(model.get_submodule(path), attribute)
    return found


@pytest.fixture(scope="module")
def folder(packable_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize_folder.quantize_folder(packable_checkpoint, out, MIXED)
    return out


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_what_is_mapped_is_what_quantizing_while_loading_gives(
    folder: Path, packable_checkpoint: Path, logits_of: Logits
) -> None:
    read = empty_model(packable_checkpoint)
    by_the_same = cpu_kernels()  # a tie may be rounded the other way by the reference
    load_quantized(
        read, packable_checkpoint, MIXED, quantize=lambda name, matrix, bits: by_the_same.quantize(matrix, bits)
    )
    model = mapped(folder)
    for name in bits_of(shapes_of(empty_model(folder)), MIXED):
        assert torch.equal(packed_of(model, name).data, packed_of(read, name).data)
    assert torch.equal(logits_of(model, IDS), logits_of(read, IDS))
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_several_shards_are_mapped_like_one(
    folder: Path, packable_layouts: list[Path], tmp_path: Path, logits_of: Logits
) -> None:
    out = tmp_path / "sharded"
    quantize_folder.quantize_folder(packable_layouts[-1], out, MIXED, shard_bytes=50_000)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert torch.equal(logits_of(mapped(out), IDS), logits_of(mapped(folder), IDS))


def test_everything_but_the_weights_is_taken_along(folder: Path, packable_checkpoint: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {path.name for path in packable_checkpoint.iterdir()}
    values = json.loads((folder / "config.json").read_text())
    assert values.pop("quantization_config") == {
        "quant_method": "ernie_serve",
        "format_version": 1,
        "recipe": "mixed",
        "group_size": 32,
        "bits": {"attention": 8, "dense": 8, "shared": 8, "experts": 4, "head": 8},
    }
    assert values == json.loads((packable_checkpoint / "config.json").read_text())


def test_the_file_is_safetensors_to_others_too_and_its_tensors_are_aligned(folder: Path) -> None:
    path = folder / "model.safetensors"
    theirs = load_file(path)
    model = mapped(folder)
    for name in bits_of(shapes_of(empty_model(folder)), MIXED):
        assert torch.equal(theirs[f"{name}.data"], packed_of(model, name).data)
    with safe_open(path, "pt") as file:
        assert any(name.startswith("padding.") for name in file.keys())  # noqa: SIM118  # it is no dict
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    starts = [8 + length + value["data_offsets"][0] for name, value in header.items() if name[:3] not in ("pad", "__m")]
    assert all(start % ALIGNMENT == 0 for start in starts)


def test_mapped_pages_are_the_files_own(folder: Path) -> None:
    model = mapped(folder)
    where = packed_of(model, "layers.1.mlp.experts.down").data.data_ptr()
    assert where % ALIGNMENT == 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, *_, path = line.split(maxsplit=5)
        begin, end = (int(word, 16) for word in span.split("-"))
        if begin <= where < end:
            assert (rights, Path(path)) == ("r--s", folder / "model.safetensors")
            return
    pytest.fail("the matrix lies in no mapping")


def test_a_truncated_shard_is_named(copied: Path) -> None:
    path = copied / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated: expected \d+ bytes, found \d+"):
        mapped(copied)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"format_version": 3},
            r"format_version 3; this version reads 1, for a CPU, and 2 for 'cuda'\. Quantize the original",
        ),
        ({"format_version": 2}, "format_version 2;"),
        ({"device": "tpu"}, "format_version 1 for 'tpu'"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"recipe": "int3"}, "int3"),
        ({"bits": {"attention": 4}}, "attention"),
        ({"group_size": 64}, "64"),
    ],
)
def test_a_folder_of_another_version_or_method_is_refused(copied: Path, change: dict[str, object], said: str) -> None:
    values = json.loads((copied / "config.json").read_text())
    values["quantization_config"] |= change
    (copied / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=said):
        ModelConfig.from_folder(copied)


def test_weights_that_do_not_fit_the_config_are_refused(copied: Path) -> None:
    values = json.loads((copied / "config.json").read_text())
    values["quantization_config"]["bits"]["experts"] = 8
    (copied / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"tensors of another form \(4\).*Quantize the original"):
        mapped(copied)


def test_quantizing_twice_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="quantized already"):
        quantize_folder.quantize_folder(folder, tmp_path / "out", MIXED)


def test_a_folder_that_is_not_empty_is_not_touched(packable_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(CheckpointError, match="not empty"):
        quantize_folder.quantize_folder(packable_checkpoint, tmp_path, MIXED)
    with pytest.raises(CheckpointError, match="is a file"):
        quantize_folder.quantize_folder(packable_checkpoint, tmp_path / "precious", MIXED)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_disk_without_room_is_noticed_before_anything_is_written(
    packable_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.\d GB; its disk has 0\.0 GB free"):
        quantize_folder.quantize_folder(packable_checkpoint, tmp_path / "out", MIXED)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_disk_that_becomes_full_leaves_nothing_behind(
    call: str, packable_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(CheckpointError, match=r"cannot be written: No space left on device\. Free some room"):
        quantize_folder.quantize_folder(packable_checkpoint, tmp_path / "out", MIXED)
    assert not list(tmp_path.iterdir())


def test_what_interrupts_the_writing_leaves_nothing_behind(packable_checkpoint: Path, tmp_path: Path) -> None:
    def interrupted(share: float, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_folder.quantize_folder(packable_checkpoint, tmp_path / "out", MIXED, interrupted)
    assert not list(tmp_path.iterdir())


def test_a_writer_that_is_killed_leaves_no_folder_of_that_name(packable_checkpoint: Path, tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from ernie_serve.model.quantize_folder import quantize_folder
from ernie_serve.model.recipes import Quantization
killed = lambda share, what: os.kill(os.getpid(), signal.SIGKILL)
quantize_folder(Path(sys.argv[1]), Path(sys.argv[2]), Quantization.of("mixed"), killed)
"""
    command = [sys.executable, "-c", program, str(packable_checkpoint), str(tmp_path / "out")]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    quantize_folder.quantize_folder(packable_checkpoint, tmp_path / "out", MIXED)
    assert mapped(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("is_link", [True, False])
def test_what_lies_under_the_name_of_what_is_unfinished_is_only_taken_away_if_it_was_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_link: bool
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "precious").write_text("kept")
    if is_link:
        (tmp_path / ".out.unfinished").symlink_to(tmp_path / "theirs")
    else:
        (tmp_path / "theirs").rename(tmp_path / ".out.unfinished")
        monkeypatch.setattr(new_folder.os, "geteuid", lambda: 12345)
    with (
        pytest.raises(CheckpointError, match=r"\.out\.unfinished is there already"),
        new_folder.new_folder(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / ".out.unfinished" / "precious").read_text() == "kept"
    assert not (tmp_path / ".out.lock").exists()


def test_without_locks_nothing_that_may_be_just_written_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(handle: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(new_folder.fcntl, "flock", no_locks)
    with new_folder.new_folder(tmp_path / "out") as unfinished:
        (unfinished / "part").write_text("kept")
        with (
            pytest.raises(CheckpointError, match="is there already"),
            new_folder.new_folder(tmp_path / "out"),
        ):
            pass
    assert (tmp_path / "out" / "part").read_text() == "kept"


def test_two_do_not_write_the_same_folder(packable_checkpoint: Path, tmp_path: Path) -> None:
    with new_folder.new_folder(tmp_path / "out") as unfinished:
        (unfinished / "part").write_text("kept")
        with pytest.raises(CheckpointError, match="is being written by another process"):
            quantize_folder.quantize_folder(packable_checkpoint, tmp_path / "out", MIXED)
    assert (tmp_path / "out" / "part").read_text() == "kept"


@pytest.mark.parametrize("recipe", ["int4", "int8", "mixed"])
def test_random_weights_are_made_in_their_bits(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logits_of: Logits
) -> None:
    shape = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 192}
    monkeypatch.setitem(GEOMETRIES, "tiny", GEOMETRIES["tiny"] | shape)
    write_random_checkpoint(tmp_path / "one", "tiny", recipe=recipe)
    write_random_checkpoint(tmp_path / "two", "tiny", recipe=recipe, layers=3)
    one, two = mapped(tmp_path / "one"), mapped(tmp_path / "two")
    name = "layers.2.mlp.experts.down"
    assert torch.equal(packed_of(one, name).data, packed_of(two, name).data)
    numbers = packed_of(one, name).dequantized()
    assert float(numbers.std()) == pytest.approx(64**-0.5, rel=0.05)
    assert abs(float(numbers.mean())) < float(numbers.std()) / 50
    q, codes = unpack(packed_of(one, name))
    assert q.min() >= (-127 if recipe == "int8" else -8)
    assert (codes > 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert logits_of(one, IDS).isfinite().all()
