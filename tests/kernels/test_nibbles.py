"""Packed matrices as torch's own 4-bit product reads them stand for the same numbers, to the rounding of bfloat16."""

import pytest
import torch

from ernie_serve.kernels import fused, nibbles, packed
from ernie_serve.kernels.cpu import CpuKernels
from ernie_serve.kernels.fused import cpu_kernels
from ernie_serve.kernels.nibbles import Nibbles, nibble_bytes, repack
from ernie_serve.kernels.packed import Packed, quantize, unpack
from ernie_serve.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16]
HALF_STEP = 2.0**-8  # of bfloat16, at most so much of a number, for each of the roundings

pytestmark = pytest.mark.skipif(not nibbles.available(), reason="this torch has no 4-bit product")


@pytest.fixture
def noise():
    chance = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=chance).to(dtype)


@pytest.fixture
def kernels():
    """Those of a machine where nothing can be compiled."""
    return CpuKernels()


def sizes(weight: Packed) -> torch.Tensor:
    """What is rounded of each weight: its magnitude, or with 8 bits those of its two halves, added."""
    q, codes = unpack(weight)
    whole = q.float().abs() if weight.bits == 4 else (q >> 4).float().abs() * 16 + (q & 15).float()
    scales = codes.float().abs().repeat_interleave(32, dim=-1) * weight.row_scales[: weight.rows, None].abs()
    return whole * scales


def bound(x: torch.Tensor, weight: Packed) -> torch.Tensor:
    """Each activation and each weight is rounded once, then the sum, and with bfloat16 the answer.

    With u the half step, |error| is at most ((1 + u)^2 - 1) sum |x| |w|, and u or 2u of the answer; the sum's own
    roundings in float32 are less than a hundredth of that.
    """
    spread = x.float().abs() @ sizes(weight).T
    answer = (x.float() @ weight.dequantized().T).abs()
    answers = 2 if x.dtype == torch.bfloat16 else 1
    return 2.03 * HALF_STEP * spread + 1.03 * answers * HALF_STEP * answer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(8, 64), (13, 128), (72, 320), (210, 64)], ids=str)
def test_products_are_off_by_the_roundings_at_most(noise, shape, bits, dtype):
    weight = quantize(noise(*shape), bits)
    made = repack(weight)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 130):
        x = noise(tokens, shape[1], dtype=dtype)
        y = made.product(x)
        assert (y.dtype, y.shape) == (dtype, (tokens, shape[0]))
        off = (y.float() - x.float() @ weight.dequantized().T).abs()
        assert bool((off <= bound(x, weight)).all())
    assert made.product(noise(0, shape[1], dtype=dtype)).shape == (0, shape[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_that_bfloat16_has_are_multiplied_exactly(bits):
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    q = torch.arange(low, high + 1, dtype=torch.int8).repeat(3)[:192].repeat(40, 10)[:, :128].contiguous()
    codes = torch.tensor([1, -1, 2, -4], dtype=torch.int8).repeat(40, 1)
    weight = packed.pack(q, codes, torch.linspace(0.1, 3.0, 40), bits)
    for column in (0, 31, 32, 97, 127):
        x = torch.zeros(1, 128)
        x[0, column] = 2.0
        torch.testing.assert_close(repack(weight).product(x), x @ weight.dequantized().T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_matrix_repacked_in_slices_is_the_whole_one(noise, bits, monkeypatch):
    weight = quantize(noise(200, 128), bits)
    whole = repack(weight)
    monkeypatch.setattr(nibbles, "_SLICE", 1)
    sliced = repack(weight)
    assert torch.equal(sliced.data, whole.data)
    assert torch.equal(sliced.scales, whole.scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(8, 64), (21, 128), (64, 320)], ids=str)
def test_the_size_is_known_from_the_shape(noise, shape, bits):
    assert repack(quantize(noise(*shape), bits)).nbytes == nibble_bytes(*shape, bits)
    assert nibble_bytes(2560, 1536, bits) * 8 / (2560 * 1536) == pytest.approx(5 * bits / 4, rel=0.01)


@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_is_read_that_was_never_written(noise, bits):
    weight, x = quantize(noise(13, 128), bits), noise(5, 128)
    expected = repack(weight).product(x)
    for poison in (float("nan"), 1e30):
        left = [torch.full((n,), poison) for n in (16, 64, 208, 320, 416, 640, 832, 1664) for _ in range(8)]
        del left  # the next tensors of these sizes lie there
        assert torch.equal(repack(weight).product(x), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_no_number_is_not_lost(noise, bits):
    made = repack(quantize(noise(8, 64), bits))
    for broken in (float("nan"), float("inf")):
        x = noise(2, 64)
        x[1, 50] = broken
        y = made.product(x)
        assert bool(y[0].isfinite().all())
        assert not y[1].isfinite().any()


def test_a_slice_of_wider_rows_is_multiplied_like_a_copy(noise):
    made, wide = repack(quantize(noise(24, 64), 4)), noise(3, 128)
    assert torch.equal(made.product(wide[:, 64:]), made.product(wide[:, 64:].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "shared_bits"), [(4, 4), (4, 8), (8, 8)])
def test_experts_are_within_a_hundredth(kernels, noise, bits, shared_bits, dtype):
    gate_up, down = quantize(noise(8, 2 * 192, 128) / 8, bits), quantize(noise(8, 128, 192) / 8, bits)
    shared = quantize(noise(2 * 256, 128) / 8, shared_bits), quantize(noise(128, 256) / 8, shared_bits)
    stacks = [[kernels.repack(matrix) for matrix in stack] for stack in (gate_up, down)]
    ours = tuple(kernels.repack(matrix) for matrix in shared)
    for tokens in (1, 2, 3, 9, 33):
        x = noise(tokens, 128, dtype=dtype)
        weights, ids = torch.rand(tokens, 3).to(dtype), torch.randint(0, 6, (tokens, 3))  # 6 and 7 have no rows
        ids[tokens // 2 :, 1] = -1
        for beside, repacked in ((None, None), (shared, ours)):
            expected = REFERENCE.experts(x.float(), weights.float(), ids, gate_up, down, beside)
            y = kernels.experts(x, weights, ids, *stacks, repacked).float()
            assert float((y - expected).norm()) <= 0.01 * float(expected.norm())


def test_matrices_are_repacked_only_where_nothing_can_be_compiled(noise, monkeypatch):
    weight = quantize(noise(8, 64), 4)
    for ops in (None, object()):
        monkeypatch.setattr(fused, "operators", lambda ops=ops: ops)
        assert cpu_kernels().repacks() == (ops is None)
        assert isinstance(cpu_kernels().repack(weight), Nibbles) == (ops is None)
    assert REFERENCE.repack(weight) is weight
    assert not REFERENCE.repacks()


def test_a_torch_without_the_product_serves_as_before(kernels, noise, monkeypatch):
    monkeypatch.setattr(nibbles, "available", lambda: False)
    weight, x = quantize(noise(13, 64), 8), noise(5, 64)
    assert kernels.repack(weight) is weight
    torch.testing.assert_close(kernels.linear(x, weight), REFERENCE.linear(x, weight))
