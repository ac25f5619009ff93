"""What a card would do wrong where Triton's interpreter does right: memory and races of every launch of these tests.

The interpreter runs programs one after the other, reads any address, and fills lanes that a mask leaves out with
zeros. On a card programs run in any order and at once, an address outside of all memory ends the process, and such
lanes hold anything.

Source: own; the checks are those of NVIDIA's compute-sanitizer for memory and, between programs, for races.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

_MOST_PROGRAMS_BESIDE = 65_535
"""In the second and third dimension of a grid; the first may have 2^31 - 1."""


class Launch:
    """What the programs of one launch read and wrote: addresses, the size of a number, and the program."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.extents = sorted({_extent(tensor) for tensor in tensors})
        self.reads: list[tuple[np.ndarray, int, int]] = []
        self.writes: list[tuple[np.ndarray, int, int]] = []
        self.unsettled: list[np.ndarray] = []
        """Bytes which the program that runs now wrote, and no barrier has shown to its other threads."""

    def touch(self, pointers, mask, what: str, program: int) -> None:
        """Refuses addresses outside of the tensors of the launch, and notes the others."""
        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        taken = np.broadcast_to(mask.data, np.shape(pointers.data))
        first = pointers.data.ravel() if taken.all() else pointers.data[taken]
        if not len(first):
            return
        least, most = int(first.min()), int(first.max()) + size
        if not any(start <= least and most <= end for start, end in self.extents):
            inside = np.zeros(first.shape, dtype=bool)
            for start, end in self.extents:
                inside |= (first >= start) & (first + size <= end)
            assert inside.all(), f"{what} of {(~inside).sum()} numbers outside of all tensors that were handed over"
        assert not (first % size).any(), f"{what} at an address that is no multiple of {size}"
        if what == "load":
            for written in self.unsettled:
                if least <= written[-1] and written[0] < most:
                    foreign = np.isin(_bytes_of(first, size), written)
                    assert not foreign.any(), "a program loads what its other threads stored, with no barrier"
            self.reads.append((first, size, program))
        else:
            self.unsettled.append(np.unique(_bytes_of(first, size)))
            self.writes.append((first, size, program))

    def check(self) -> None:
        """Refuses what depends on the order of programs."""
        if not self.writes:
            return
        written = np.concatenate([_bytes_of(first, size) for first, size, _ in self.writes])
        by = np.concatenate([np.full(first.size * size, program) for first, size, program in self.writes])
        order = np.lexsort((by, written))
        written, by = written[order], by[order]
        twice = (written[1:] == written[:-1]) & (by[1:] != by[:-1])
        assert not twice.any(), f"two programs write the same {twice.sum()} bytes"
        for first, size, program in self.reads:
            near = first[(first <= written[-1]) & (first + size > written[0])]
            each = _bytes_of(near, size)
            at = np.minimum(np.searchsorted(written, each), len(written) - 1)
            foreign = (written[at] == each) & (by[at] != program)
            assert not foreign.any(), f"a program reads {foreign.sum()} bytes that another one writes"


def _bytes_of(first: np.ndarray, size: int) -> np.ndarray:
    """The addresses of all bytes of numbers of `size` bytes that begin at `first`."""
    return (first[:, None] + np.arange(size, dtype=first.dtype)).ravel()


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the one after its last."""
    numbers = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (numbers * tensor.element_size() if tensor.numel() else 0)


@contextmanager
def watched() -> Iterator[None]:
    """Every launch of a kernel in the interpreter is checked.

    Raises:
        InterpreterError: for an address outside of the tensors, an odd one, or a load behind a store without a barrier.
        AssertionError: at the end of a launch, for programs that write or read what another one writes.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launches: list[Launch] = []

    def program(self) -> int:
        x, y, z = self.grid_idx
        return (x * self.grid_dim[1] + y) * self.grid_dim[2] + z

    def set_grid_dim(self, nx, ny, nz):
        assert max(ny, nz) <= _MOST_PROGRAMS_BESIDE, f"a grid of {nx}, {ny}, {nz}"
        whole["set_grid_dim"](self, nx, ny, nz)

    def set_grid_idx(self, x, y, z):
        launches[-1].unsettled.clear()
        whole["set_grid_idx"](self, x, y, z)

    def create_masked_load(self, pointers, mask, other, *options):
        launches[-1].touch(pointers, mask, "load", program(self))
        found = whole["create_masked_load"](self, pointers, mask, other, *options)
        if other is None and not np.all(mask.data):
            anything = np.full(found.data.shape, 0xA5 if found.data.dtype == np.uint8 else 93, found.data.dtype)
            found.data = np.where(mask.data, found.data, anything)
        return found

    def create_masked_store(self, pointers, value, mask, *options):
        launches[-1].touch(pointers, mask, "store", program(self))
        return whole["create_masked_store"](self, pointers, value, mask, *options)

    def create_barrier(self):
        launches[-1].unsettled.clear()

    def atomic(self, *arguments):
        raise AssertionError("these kernels promise the same result in any order, so they have no atomic")

    def call(self, *arguments, **named):
        tensors = [x for x in (*arguments, *named.values()) if isinstance(x, torch.Tensor)]
        launches.append(Launch(tensors))
        try:
            launch(self, *arguments, **named)
            launches[-1].check()
        finally:
            launches.pop()

    hooks = (set_grid_dim, set_grid_idx, create_masked_load, create_masked_store, create_barrier)
    whole = {hook.__name__: getattr(builder, hook.__name__) for hook in hooks}
    launch = executor.__call__
    with pytest.MonkeyPatch.context() as patch:
        for hook in hooks:
            patch.setattr(builder, hook.__name__, hook)
        for name in ("create_atomic_cas", "create_atomic_rmw"):
            patch.setattr(builder, name, atomic)
        patch.setattr(executor, "__call__", call)
        yield
