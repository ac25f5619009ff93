"""Takes tensors from their files to their places in the parameters, or in matrices by themselves, a few at a time.

Knows places, memory and devices. Knows neither what a tensor is called on disk nor what it is for.
"""

import mmap
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ernie_serve.model.safetensors_file import BLOCK_BYTES, StoredTensor

Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the checkpoint goes: some rows of a parameter, or of one expert of it.

    `shape` is the tensor's own; a transposed one is [in, out] where the parameter's rows are [out, in].
    """

    parameter: str
    shape: tuple[int, ...]
    first_row: int
    num_rows: int
    expert: int | None = None
    transposed: bool = False

    def view(self, parameter: Tensor) -> Tensor:
        """The part of `parameter` that this tensor fills, seen in the tensor's own shape."""
        return self.in_matrix(parameter if self.expert is None else parameter[self.expert])

    def in_matrix(self, matrix: Tensor) -> Tensor:
        """The same part of the one matrix it belongs to: the parameter, or this expert of it."""
        rows = matrix[self.first_row : self.first_row + self.num_rows]
        return (rows.T if self.transposed else rows).view(self.shape)


Put = Callable[[Place, StoredTensor, torch.dtype], None]
"""Takes a tensor to its place: reads it, whole or in blocks, its bits being of that dtype. Several threads call it."""

Keep = Callable[[str, int | None, Tensor], None]
"""Takes a whole matrix: which parameter it is, or which expert of it. Several threads call it."""


def into_parameters(
    model: nn.Module,
    device: torch.device,
    apart: frozenset[str] = frozenset(),
    beside: Mapping[str, Tensor] = MappingProxyType({}),
) -> Put:
    """Give the parameters memory where they have none, but for those `apart`, and copy each tensor there.

    What lies `beside` them is filled by its name too.
    """
    for path, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta and path not in apart:
            owner, _, name = path.rpartition(".")
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            filled = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            setattr(model.get_submodule(owner), name, filled)
    parameters = {name: tensor.detach() for name, tensor in model.state_dict().items()} | dict(beside)
    copy = _Copier()

    def put(place: Place, stored: StoredTensor, dtype: torch.dtype) -> None:
        copy(place.view(parameters[place.parameter]), place, stored, dtype)

    return put


def into_matrices(shapes: Mapping[str, torch.Size], dtype: torch.dtype, keep: Keep, rest: Put) -> Put:
    """Collect the tensors of each matrix of these parameters on the CPU, and give it to `keep` when it is whole.

    Only matrices that are being read take memory, if their tensors are read one after the other. `rest` takes the
    tensors of other parameters.
    """
    copy, lock = _Copier(), threading.Lock()
    begun: dict[tuple[str, int | None], tuple[Tensor, list[int]]] = {}  # and the rows that each still lacks

    def put(place: Place, stored: StoredTensor, bits: torch.dtype) -> None:
        if place.parameter not in shapes:
            return rest(place, stored, bits)
        key = (place.parameter, place.expert)
        with lock:
            if key not in begun:
                shape = shapes[place.parameter] if place.expert is None else shapes[place.parameter][1:]
                begun[key] = _passing(shape, dtype), [shape[0]]
            matrix, lacking = begun[key]
        copy(place.in_matrix(matrix), place, stored, bits)
        with lock:
            lacking[0] -= place.num_rows
            whole = lacking[0] == 0 and bool(begun.pop(key))
        if whole:
            keep(*key, matrix)
        return None

    return put


class _Copier:
    """Fills a view of memory with a tensor of a file; each thread has a buffer of its own for what needs converting."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __call__(self, view: Tensor, place: Place, stored: StoredTensor, dtype: torch.dtype) -> None:
        if view.device.type == "cpu" and view.dtype == dtype and view.is_contiguous():
            return stored.read_into(view)
        if not hasattr(self._local, "buffer"):
            self._local.buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=view.is_cuda)
        for first, rows in stored.blocks(dtype, self._local.buffer):
            part, rows = view[first : first + len(rows)], rows.to(view.device, view.dtype)
            if place.transposed:
                _copy_transposed(part.T, rows)
            else:
                part.copy_(rows)
        return None


def _passing(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory that goes back to the system with the tensor: malloc may keep hundreds of MiB of what it gets back."""
    return torch.frombuffer(mmap.mmap(-1, shape.numel() * dtype.itemsize), dtype=dtype).view(shape)


def _copy_transposed(target: Tensor, rows: Tensor) -> None:
    """Fill `target` with `rows` transposed. torch is quick at this only where the target is contiguous."""
    turned = target if target.is_contiguous() else torch.empty(target.shape, dtype=rows.dtype, device=rows.device)
    turned.copy_(rows.T)
    if turned is not target:
        target.copy_(turned)


def read_all(
    work: list[tuple[Place, StoredTensor]], dtypes: dict[str, torch.dtype], put: Put, progress: Progress
) -> None:
    """Read in this order with a few threads; one waits for the disk while another copies."""
    total = sum(stored.num_bytes for _, stored in work)
    done = steps = 0
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="weights")
    try:
        futures = [pool.submit(put, place, stored, dtypes[stored.dtype]) for place, stored in work]
        for future, (_, stored) in zip(futures, work, strict=True):
            future.result()
            done += stored.num_bytes
            if done * 200 // total > steps:
                steps = done * 200 // total
                progress(done / total, f"reading {stored.file.path.name}")
    finally:
        pool.shutdown(cancel_futures=True)
