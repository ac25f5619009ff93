"""The quantized form of a checkpoint on disk: sharded safetensors that are mapped, or read into a GPU.

Knows names, offsets and files. Knows nothing of rounding, nor of the network beyond the names and shapes of its
parameters. The folder is one of safetensors with a `quantization_config` of ours in `config.json`; the tensors are

    NAME                          norms, routers and their bias, as they are
    NAME.data, NAME.row_scales    a packed matrix or stack of NAME for a CPU, as `kernels.packed` defines it
    NAME.data, NAME.scales        one for a GPU, as `kernels.quantized` defines it
    padding.0, padding.1, …       bytes that make the next tensor begin at a multiple of 64

Every size is known from `config.json`, so the files have their full size before the first matrix is read, and a disk
that is too full is noticed then.
"""

import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ernie_serve.errors import CheckpointError
from ernie_serve.model import forms
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.forms import Form, Kept
from ernie_serve.model.packing import set_matrix
from ernie_serve.model.placing import Place, Progress, into_parameters, read_all
from ernie_serve.model.quantize import Shapes, bits_of, shapes_of
from ernie_serve.model.recipes import Quantization
from ernie_serve.model.repacking import Repacked, is_repacked
from ernie_serve.model.safetensors_file import StoredTensor
from ernie_serve.model.shards import Shards, cut, some, write_index

ALIGNMENT = 64
SHARD_BYTES = 5 * 10**9

_PLAIN = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPES = _PLAIN | {"U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}
_PIECE = 256 << 20  # mapped at a time, between two reports


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor to be written: its dtype in the format's words, its shape and size."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


class QuantizedWriter:
    """Makes the files of a folder at their full size, then takes matrices in any order, from several threads.

    `plain` is the dtype of norms; routers are float32. Raises `OSError`, such as for a full disk.
    """

    def __init__(
        self, folder: Path, shapes: Shapes, bits: Mapping[str, Form], plain: torch.dtype, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._at: dict[str, tuple[int, int, _Entry]] = {}  # file, offset, what it is
        self._written = 0
        self._files = ExitStack()
        entries = _entries(shapes, bits, plain)
        files = cut({name: entry.num_bytes for name, entry in entries.items()}, shard_bytes)
        try:
            for name, tensors in files.items():
                self._create(folder / name, {each: entries[each] for each in tensors})
        except BaseException:
            self._files.close()
            raise
        self.num_bytes = sum(entry.num_bytes for entry in entries.values())
        write_index(folder, files, self.num_bytes)

    def _create(self, path: Path, entries: Mapping[str, _Entry]) -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._files.callback(os.close, handle)
        header, offsets, size = _header(entries)
        os.posix_fallocate(handle, 0, size)
        os.pwrite(handle, header, 0)
        self._at |= {name: (handle, offsets[name], entry) for name, entry in entries.items()}

    def put(self, name: str, expert: int | None, matrix: Kept) -> None:
        """Write a quantized matrix of a parameter, or of one expert of it."""
        for part, tensor in forms.tensors_of(matrix).items():
            self._write(f"{name}.{part}", expert, tensor)

    def put_plain(self, name: str, tensor: Tensor) -> None:
        """Write a parameter that stays as it is."""
        self._write(name, None, tensor.detach().to(_DTYPES[self._at[name][2].dtype]))

    def finish(self) -> None:
        """Bring everything to the disk. All tensors have been put."""
        assert self._written == self.num_bytes, f"{self.num_bytes - self._written} bytes were never written"
        for handle in {handle for handle, _, _ in self._at.values()}:
            os.fsync(handle)
        self.close()

    def close(self) -> None:
        """Give the files back, whole or not."""
        self._files.close()

    def _write(self, name: str, expert: int | None, tensor: Tensor) -> None:
        handle, offset, entry = self._at[name]
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        expected = entry.num_bytes if expert is None else entry.num_bytes // entry.shape[0]
        assert len(data) == expected, f"{name} has {len(data)} bytes instead of {expected}"
        offset += 0 if expert is None else expert * expected
        done = 0
        while done < len(data):
            done += os.pwrite(handle, data[done : done + 2**30], offset + done)
        self._written += len(data)


def load_mapped(model: Ernie, folder: Path, quantization: Quantization, progress: Progress | None = None) -> None:
    """Fill a model on the meta device from a quantized folder, whose packed matrices stay where they are: in the files.

    The pages are shared with every process that maps the same files, and nobody can write to them. All are brought into
    memory before this returns. Where the kernels repack matrices, each is copied instead, and nothing stays mapped.
    Raises `CheckpointError` when a file is absent, truncated, or of other shapes.
    """
    shapes = shapes_of(model)
    bits = bits_of(shapes, quantization)
    progress = progress or (lambda *_: None)
    maps, matrices, others = _mapped(folder, shapes, bits)
    for name, tensor in others.items():
        path, _, attribute = name.rpartition(".")
        dtype = model.get_parameter(name).dtype
        setattr(model.get_submodule(path), attribute, nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False))
    if is_repacked(quantization, model.kernels):
        _repack(model, matrices, bits, list(maps.values()), progress)
        return
    _fetch_all(maps, progress)
    for name, packed in matrices.items():
        set_matrix(model, name, packed)


def _repack(
    model: Ernie,
    matrices: Mapping[str, Kept],
    bits: Mapping[str, Form],
    maps: list[mmap.mmap],
    progress: Progress,
) -> None:
    """Copy the matrices, one after the other, without keeping the pages that they are copied from."""
    repacked = Repacked(model, bits)
    total, done = sum(packed.nbytes for packed in matrices.values()), 0
    for name, packed in matrices.items():
        experts = range(len(packed)) if packed.data.dim() == 4 else [None]
        for expert in experts:
            repacked.keep(name, expert, packed if expert is None else packed[expert])
        for memory in maps:
            memory.madvise(mmap.MADV_DONTNEED)
        done += packed.nbytes
        progress(done / total, f"repacking {name}")
    repacked.finish()


def _fetch_all(maps: Mapping[Path, mmap.mmap], progress: Progress) -> None:
    total, done = sum(map(len, maps.values())), 0
    for path, memory in maps.items():
        for start in range(0, len(memory), _PIECE):
            length = min(_PIECE, len(memory) - start)
            _fetch(memory, start, length)
            done += length
            progress(done / total, f"mapping {path.name}")


def load_read(
    model: Ernie, folder: Path, quantization: Quantization, progress: Progress | None = None, *, device: torch.device
) -> None:
    """Fill a model on the meta device from a quantized folder, tensor by tensor into the device's own memory.

    Raises `CheckpointError` when a file is absent, truncated, or of other shapes.
    """
    shapes = shapes_of(model)
    bits = bits_of(shapes, quantization)
    with Shards(folder) as shards:
        stored = {name: tensor for name, tensor in shards.tensors.items() if not name.startswith("padding.")}
        _check(folder, stored, shapes, bits)
        matrices = {name: forms.empty(shapes[name], form, device) for name, form in bits.items()}
        beside = {
            f"{name}.{part}": tensor
            for name, kept in matrices.items()
            for part, tensor in forms.tensors_of(kept).items()
        }
        work = [(Place(name, each.shape, 0, each.shape[0]), each) for name, each in stored.items()]
        read_all(work, _DTYPES, into_parameters(model, device, frozenset(bits), beside), progress or (lambda *_: None))
    for name, kept in matrices.items():
        set_matrix(model, name, kept)


def _mapped(
    folder: Path, shapes: Shapes, bits: Mapping[str, Form]
) -> tuple[dict[Path, mmap.mmap], dict[str, Kept], dict[str, Tensor]]:
    """A folder's files as memory, its packed matrices and its other parameters, all in that memory."""
    with Shards(folder) as shards:
        stored = {name: tensor for name, tensor in shards.tensors.items() if not name.startswith("padding.")}
        _check(folder, stored, shapes, bits)
        maps = {file.path: file.map() for file in dict.fromkeys(tensor.file for tensor in stored.values())}
        tensors = {name: _tensor(maps[tensor.file.path], tensor) for name, tensor in stored.items()}
    matrices = {
        name: forms.made_of(
            {part: tensors[f"{name}.{part}"] for part in forms.parts(shapes[name], form)}, shapes[name], form
        )
        for name, form in bits.items()
    }
    return maps, matrices, {name: tensors[name] for name in shapes if name not in bits}


def _check(folder: Path, stored: Mapping[str, StoredTensor], shapes: Shapes, bits: Mapping[str, Form]) -> None:
    expected = _entries(shapes, bits, torch.float32)
    wrong = [
        f"{name} is {stored[name].dtype} {list(stored[name].shape)} instead of {entry.dtype} {list(entry.shape)}"
        for name, entry in expected.items()
        if name in stored
        and (stored[name].shape != entry.shape or (stored[name].dtype != entry.dtype and name not in shapes))
    ]
    wrong += [
        f"{name} is {stored[name].dtype}" for name in shapes if name in stored and stored[name].dtype not in _PLAIN
    ]
    uneven = [name for name, tensor in stored.items() if tensor.start % ALIGNMENT]
    problems = [
        f"{what} ({len(names)}): {some(names)}."
        for what, names in (
            ("missing tensors", [name for name in expected if name not in stored]),
            ("unexpected tensors", [name for name in stored if name not in expected]),
            ("tensors of another form", wrong),
            (f"tensors that do not begin at a multiple of {ALIGNMENT} bytes", uneven),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{folder} does not fit its config.json: {' '.join(problems)} Quantize the original checkpoint again."
        )


def _entries(shapes: Shapes, bits: Mapping[str, Form], plain: torch.dtype) -> dict[str, _Entry]:
    """Every tensor of the folder, in order."""
    entries = {}
    for name, shape in shapes.items():
        if name not in bits:
            dtype = torch.float32 if ".router." in name else plain
            entries[name] = _Entry(_WORDS[dtype], tuple(shape), math.prod(shape) * dtype.itemsize)
            continue
        for part, (dtype, each) in forms.parts(shape, bits[name]).items():
            entries[f"{name}.{part}"] = _Entry(_WORDS[dtype], each, math.prod(each) * dtype.itemsize)
    return entries


def _header(entries: Mapping[str, _Entry]) -> tuple[bytes, dict[str, int], int]:
    """The bytes before the tensors, where each begins, counted from the file's first byte, and the file's size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends, end = {}, 0
    for name, entry in entries.items():
        if extra := -end % ALIGNMENT:
            header[f"padding.{len(header)}"] = {"dtype": "U8", "shape": [extra], "data_offsets": [end, end + extra]}
            end += extra
        ends[name] = end
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [end, end + entry.num_bytes]}
        end += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: start + begin for name, begin in ends.items()}, start + end


def _tensor(memory: mmap.mmap, stored: StoredTensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # and nothing writes there
        flat = torch.frombuffer(memory, dtype=_DTYPES[stored.dtype], count=math.prod(stored.shape), offset=stored.start)
    return flat.view(stored.shape)


_MADV_POPULATE_READ = 22  # Linux 5.14


def _fetch(memory: mmap.mmap, start: int, length: int) -> None:
    """Bring a piece of a mapping into memory, so that no page is waited for while tokens are made."""
    try:
        memory.madvise(_MADV_POPULATE_READ, start, length)
    except (OSError, ValueError):
        memory.madvise(mmap.MADV_WILLNEED, start, length)
        sum(memory[start : start + length : mmap.PAGESIZE])
