"""One safetensors file: its header checked whole, its tensors read straight into memory that is already there.

Knows the file format, byte by byte. Knows nothing of what the tensors mean or where they belong. Reads with
`pread`, not by mapping: mapped pages would count as the process's memory and double it while loading. `map` is for
files whose bytes are used as they lie.

    8 bytes      little-endian length n of the header
    n bytes      JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {...}}
    the rest     the tensors, one behind the other, no byte between them; offsets count from here
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernie_serve.errors import CheckpointError

BLOCK_BYTES = 16 * 2**20
"""The most that `blocks` reads at a time."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""

_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2}
_ITEM_BYTES |= {"BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in its file. `dtype` is the file's word for it; `start` counts from the file's first byte."""

    file: "SafetensorsFile"
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def read_into(self, memory: Tensor, skip_bytes: int = 0) -> None:
        """Fill contiguous CPU `memory` with this tensor's bytes from `skip_bytes` on; the bits are not converted."""
        self.file.read_into(memory, self.start + skip_bytes)

    def blocks(self, dtype: torch.dtype, buffer: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Read a few rows at a time: (number of the first row, rows), the bits taken as `dtype`.

        The rows lie in `buffer`, contiguous CPU memory of type uint8, and are overwritten by the next ones.
        """
        row_bytes = self.num_bytes // self.shape[0]
        step = max(1, buffer.numel() // row_bytes)
        if row_bytes > buffer.numel():
            buffer = torch.empty(row_bytes, dtype=torch.uint8)
        for first in range(0, self.shape[0], step):
            rows = min(step, self.shape[0] - first)
            piece = buffer[: rows * row_bytes]
            self.read_into(piece, first * row_bytes)
            yield first, piece.view(dtype).view(rows, *self.shape[1:])


class SafetensorsFile:
    """An open file. `tensors` are in the order in which they lie.

    Raises `CheckpointError` with the file, and the bytes expected and found, for anything that is not a
    whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
            try:
                self.tensors = self._read_header()
            except BaseException:
                os.close(self._handle)
                raise
        except OSError as error:  # of opening it, or of reading what is no file
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error

    def close(self) -> None:
        """Give the file back. Its tensors cannot be read any more."""
        os.close(self._handle)

    def map(self) -> mmap.mmap:
        """The whole file as memory that can only be read. It outlives `close`."""
        return mmap.mmap(self._handle, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)

    def read_into(self, memory: Tensor, start: int) -> None:
        """Fill contiguous CPU `memory` with the bytes from `start` on."""
        target = memory.view(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(target):
            count = os.preadv(self._handle, [target[done : done + 2**30]], start + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.path} ended while it was read: expected {start + len(target)} bytes, found {start + done}."
                )
            done += count

    def _read_header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self._handle).st_size
        head = os.pread(self._handle, 40, 0)
        if head.startswith(b"version https://git-lfs"):
            raise CheckpointError(
                f"{self.path} is a Git LFS pointer of {size} bytes, not the weights. Fetch them with `git lfs pull`."
            )
        if len(head) < 8:
            raise CheckpointError(f"{self.path} is truncated: expected at least 8 bytes, found {size}.")
        (length,) = struct.unpack("<Q", head[:8])
        if not 2 <= length <= MAX_HEADER_BYTES or head[8:9] not in (b"{", b""):
            raise CheckpointError(f"{self.path} is not a safetensors file: it does not begin with a header.")
        if 8 + length > size:
            raise CheckpointError(
                f"{self.path} is truncated: expected at least {8 + length} bytes for its header, found {size}."
            )
        try:
            header = json.loads(_read_bytes(self._handle, length, 8))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path} is not a safetensors file: its header is not JSON ({error})."
            ) from error
        header.pop("__metadata__", None)
        tensors = sorted((self._stored(name, value, 8 + length) for name, value in header.items()), key=_start)
        end = 8 + length
        for tensor in tensors:
            if tensor.start != end:
                raise CheckpointError(f"{self.path}: {tensor.name} does not begin where the tensor before it ends.")
            end += tensor.num_bytes
        if end != size:
            word = "truncated" if size < end else "longer than its header says"
            raise CheckpointError(f"{self.path} is {word}: expected {end} bytes, found {size}.")
        return {tensor.name: tensor for tensor in tensors}

    def _stored(self, name: str, value: Any, data_start: int) -> StoredTensor:
        match value:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if all(
                type(number) is int and number >= 0 for number in (*shape, begin, end)
            ):
                if dtype not in _ITEM_BYTES:
                    raise CheckpointError(f"{self.path}: {name} has the unknown dtype {dtype}.")
                expected = math.prod(shape) * _ITEM_BYTES[dtype]
                if end - begin != expected:
                    raise CheckpointError(
                        f"{self.path}: {name} of shape {shape} and dtype {dtype} has {expected} bytes, "
                        f"its offsets span {end - begin}."
                    )
                return StoredTensor(self, name, dtype, tuple(shape), data_start + begin, expected)
        raise CheckpointError(f"{self.path}: the header's entry for {name} has no valid dtype, shape and data_offsets.")


def write_safetensors(path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Iterable[Tensor]) -> None:
    """Write a file one tensor at a time. `layout` is name -> (dtype in the file's words, shape), in file order;
    `tensors` yields their contents in that order, contiguous on the CPU and of as many bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + math.prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for (name, _), tensor in zip(layout.items(), tensors, strict=True):
            begin, end = header[name]["data_offsets"]
            data = tensor.view(-1).view(torch.uint8).numpy().data
            assert len(data) == end - begin, f"{name} has {len(data)} bytes, its shape and dtype say {end - begin}"
            out.write(data)


def _start(tensor: StoredTensor) -> int:
    return tensor.start


def _read_bytes(handle: int, length: int, start: int) -> bytes:
    parts = []
    while length > 0 and (part := os.pread(handle, length, start)):
        parts.append(part)
        start, length = start + len(part), length - len(part)
    return b"".join(parts)
