"""Takes tensors from their files to their places in the parameters, a few at a time.

Knows places, memory and devices. Knows neither what a tensor is called on disk nor what it is for.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
        matrix = parameter if self.expert is None else parameter[self.expert]
        rows = matrix[self.first_row : self.first_row + self.num_rows]
        return (rows.T if self.transposed else rows).view(self.shape)


Put = Callable[[Place, StoredTensor, torch.dtype], None]
"""Takes a tensor to its place: reads it, whole or in blocks, its bits being of that dtype. Several threads call it."""


def into_parameters(model: nn.Module, device: torch.device) -> Put:
    """Give the parameters memory where they have none, and copy each tensor there."""
    for path, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            owner, _, name = path.rpartition(".")
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            filled = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            setattr(model.get_submodule(owner), name, filled)
    parameters = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    local = threading.local()

    def put(place: Place, stored: StoredTensor, dtype: torch.dtype) -> None:
        view = place.view(parameters[place.parameter])
        if view.device.type == "cpu" and view.dtype == dtype and view.is_contiguous():
            return stored.read_into(view)
        if not hasattr(local, "buffer"):
            local.buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=view.is_cuda)
        for first, rows in stored.blocks(dtype, local.buffer):
            part, rows = view[first : first + len(rows)], rows.to(view.device, view.dtype)
            if place.transposed:
                _copy_transposed(part.T, rows)
            else:
                part.copy_(rows)
        return None

    return put


def _copy_transposed(target: Tensor, rows: Tensor) -> None:
    """Fill `target` with `rows` transposed. torch is quick at this only where the target is contiguous."""
    turned = target if target.is_contiguous() else torch.empty(target.shape, dtype=rows.dtype, device=rows.device)
    turned.copy_(rows.T)
    if turned is not target:
        target.copy_(turned)


def read_all(
    work: list[tuple[Place, StoredTensor]], dtypes: dict[str, torch.dtype], put: Put, progress: Progress
) -> None:
    """Read in file order with a few threads; one waits for the disk while another copies."""
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
