import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

# what wrong kernels do; every other test of this folder is watched for it


@triton.jit
def _copy(x, out, SHIFT: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr = 4):
    at = tl.arange(0, BLOCK)
    found = tl.load(x + tl.program_id(0) * BLOCK + at + SHIFT)
    tl.store(out + tl.program_id(0) * STEP + at, found)


@triton.jit
def _reverse(x, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + BLOCK + at, tl.load(x + BLOCK - 1 - at))


@triton.jit
def _half(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < BLOCK // 2))


@triton.jit
def _nothing(x):
    pass


@triton.jit
def _count(x):
    tl.atomic_add(x, 1.0)


def test_an_address_outside_of_all_tensors():
    memory = torch.zeros(64)
    _copy[(2,)](memory[:8], memory[32:40], SHIFT=0, BLOCK=4)
    with pytest.raises(InterpreterError, match="load of 1 numbers outside of all tensors"):
        _copy[(2,)](memory[:8], memory[32:40], SHIFT=1, BLOCK=4)
    with pytest.raises(InterpreterError, match="store of 4 numbers outside of all tensors"):
        _copy[(2,)](memory[:8], memory[32:36], SHIFT=0, BLOCK=4)


def test_a_number_that_begins_between_two():
    odd = torch.frombuffer(bytearray(13), dtype=torch.float32, offset=1)
    with pytest.raises(InterpreterError, match="no multiple of 4"):
        _copy[(1,)](odd, torch.zeros(2), SHIFT=0, BLOCK=2)


def test_programs_that_read_and_write_what_others_write():
    memory = torch.zeros(12)
    with pytest.raises(AssertionError, match="reads 16 bytes that another one writes"):
        _copy[(2,)](memory, memory, SHIFT=4, BLOCK=4)
    with pytest.raises(AssertionError, match="two programs write the same 16 bytes"):
        _copy[(3,)](memory, torch.zeros(12), SHIFT=0, BLOCK=4, STEP=2)
    _copy[(2,)](memory, memory, SHIFT=0, BLOCK=4)


def test_a_load_behind_a_store_needs_a_barrier():
    memory = torch.zeros(8, dtype=torch.int32)
    _reverse[(1,)](memory, BARRIER=True, BLOCK=4)
    assert memory.tolist() == [0, 1, 2, 3, 3, 2, 1, 0]
    with pytest.raises(InterpreterError, match="with no barrier"):
        _reverse[(1,)](memory, BARRIER=False, BLOCK=4)


def test_what_a_mask_leaves_out_is_not_nothing():
    out = torch.zeros(4)
    _half[(1,)](torch.ones(4), out, BLOCK=4)
    assert out.tolist() == [1, 1, 93, 93]


def test_a_grid_that_no_card_takes():
    _nothing[(70_000,)](torch.zeros(1))
    with pytest.raises(AssertionError, match="70000"):
        _nothing[(1, 70_000)](torch.zeros(1))


def test_an_atomic():
    with pytest.raises(InterpreterError, match="no atomic"):
        _count[(2,)](torch.zeros(1))
