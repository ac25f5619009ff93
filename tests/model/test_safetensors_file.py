"""A file that is not whole is refused with the numbers; one that is, is read to the bit."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie_serve.errors import CheckpointError
from ernie_serve.model.safetensors_file import SafetensorsFile, write_safetensors

TENSORS = {
    "half": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "full": torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(2)),
    "bits": torch.arange(40000, dtype=torch.int32).to(torch.uint16),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def opened(path: Path) -> Iterator[SafetensorsFile]:
    file = SafetensorsFile(path)
    yield file
    file.close()


def test_tensors_are_listed_in_the_order_in_which_they_lie(opened: SafetensorsFile) -> None:
    starts = [tensor.start for tensor in opened.tensors.values()]
    assert starts == sorted(starts)
    assert {name: tensor.shape for name, tensor in opened.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }
    assert {tensor.dtype for tensor in opened.tensors.values()} == {"BF16", "F32", "U16"}


@pytest.mark.parametrize("name", list(TENSORS))
def test_a_tensor_is_read_into_memory_that_is_there(name: str, opened: SafetensorsFile) -> None:
    memory = torch.zeros_like(TENSORS[name])
    opened.tensors[name].read_into(memory)
    assert torch.equal(memory, TENSORS[name])


@pytest.mark.parametrize("buffer_bytes", [1, 10, 25, 1000])
def test_blocks_of_any_size_are_the_tensor(buffer_bytes: int, opened: SafetensorsFile) -> None:
    buffer = torch.empty(buffer_bytes, dtype=torch.uint8)
    blocks = [(first, rows.clone()) for first, rows in opened.tensors["half"].blocks(torch.bfloat16, buffer)]
    assert torch.equal(torch.cat([rows for _, rows in blocks]), TENSORS["half"])
    assert [first for first, _ in blocks] == [sum(len(rows) for _, rows in blocks[:i]) for i in range(len(blocks))]


def test_bits_are_taken_as_bfloat16_and_not_converted(opened: SafetensorsFile) -> None:
    ((_, rows),) = opened.tensors["bits"].blocks(torch.bfloat16, torch.empty(80000, dtype=torch.uint8))
    assert torch.equal(rows.view(torch.uint16), TENSORS["bits"])


def test_a_written_file_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    layout = {"a": ("BF16", (7, 5)), "b": ("F32", (3, 4, 2))}
    write_safetensors(tmp_path / "x.safetensors", layout, iter([TENSORS["half"], TENSORS["full"]]))
    written = load_file(tmp_path / "x.safetensors")
    assert torch.equal(written["a"], TENSORS["half"])
    assert torch.equal(written["b"], TENSORS["full"])


@pytest.mark.parametrize("lost", [1, 300, 80000])
def test_a_truncated_file_is_refused_with_both_sizes(lost: int, path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    with pytest.raises(
        CheckpointError,
        match=rf"model\.safetensors is truncated: expected {len(whole)} bytes, found {len(whole) - lost}",
    ):
        SafetensorsFile(path)


@pytest.mark.parametrize("size", [0, 5, 8, 40])
def test_a_file_that_ends_in_its_header_is_refused(size: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"truncated: expected at least \d+ bytes.*found {size}"):
        SafetensorsFile(path)


def test_a_file_that_goes_on_behind_its_tensors_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        SafetensorsFile(path)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(path: Path, opened: SafetensorsFile) -> None:
    last = list(opened.tensors.values())[-1]
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(CheckpointError, match=r"ended while it was read: expected \d+ bytes, found \d+"):
        last.file.read_into(torch.empty(last.num_bytes, dtype=torch.uint8), last.start)


def test_a_git_lfs_pointer_is_called_one(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        SafetensorsFile(path)


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(100), b"\x80\x02}" + bytes(100), b"<html>not found</html>"])
def test_a_file_of_another_kind_is_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        SafetensorsFile(path)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: Is a directory\."):
        SafetensorsFile(tmp_path / "model.safetensors")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors cannot be read: No such file"):
        SafetensorsFile(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"{" + b'"a":{' * 100000, "is not JSON"),
        ({"a": 3}, "entry for a"),
        ({"a": entry(shape=[-2])}, "entry for a"),
        ({"a": entry(shape=[True])}, "entry for a"),
        ({"a": entry(shape="2")}, "entry for a"),
        ({"a": entry(offsets=[0])}, "entry for a"),
        ({"a": entry(offsets=[-8, 0])}, "entry for a"),
        ({"a": {"dtype": "F32"}}, "entry for a"),
        ({"a": entry(dtype="F5")}, "unknown dtype F5"),
        ({"a": entry(shape=[3])}, r"a of shape \[3\] and dtype F32 has 12 bytes, its offsets span 8"),
        ({"a": entry(offsets=[8, 0])}, "its offsets span -8"),
        ({"a": entry(), "b": entry()}, "b does not begin where the tensor before it ends"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "b does not begin where"),
        ({"a": entry(offsets=[4, 12])}, "a does not begin where"),
        ({"a": entry(shape=[2**40], offsets=[0, 2**42])}, "truncated: expected"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(header: Any, message: str, path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(raw(path, header, bytes(12)))


def test_a_header_length_beyond_the_formats_bound_is_refused(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}" + bytes(100))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        SafetensorsFile(path)
