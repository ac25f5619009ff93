"""The packed format: its layout byte by byte, and how near its numbers are."""

import pytest
import torch

from ernie_serve.errors import SettingsError
from ernie_serve.kernels.packed import Packed, empty, pack, padded, quantize, require_packable, unpack

BITS = [4, 8]


@pytest.fixture
def chance():
    return torch.Generator().manual_seed(0)


def random_parts(chance, bits, *shape):
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    *stack, rows, columns = shape
    q = torch.randint(low, high, shape, generator=chance, dtype=torch.int8)
    codes = torch.randint(-127, 128, (*stack, rows, columns // 32), generator=chance, dtype=torch.int8)
    return q, codes, torch.rand((*stack, rows), generator=chance)


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_is_where_the_format_says(chance, bits):
    q, codes, scales = random_parts(chance, bits, 16, 128)
    data = pack(q, codes, scales, bits).data.tolist()
    for row in range(16):
        block, j = divmod(row, 8)
        for column in range(128):
            unit, within = divmod(column, 64)
            group, place = divmod(within, 32)
            assert data[block][unit][8 * group + j] == codes[row, column // 32].item() % 256
            if bits == 4:
                vector, rest = divmod(place, 8)
                byte = data[block][unit][16 + 128 * group + 32 * vector + 4 * j + rest % 4]
                assert (byte >> 4 if rest >= 4 else byte & 15) == q[row, column].item() + 8
            else:
                vector, rest = divmod(place, 4)
                byte = data[block][unit][16 + 256 * group + 32 * vector + 4 * j + rest]
                assert byte == q[row, column].item() % 256


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(8, 64), (16, 128), (5, 64), (23, 192), (3, 8, 64), (2, 13, 128)], ids=str)
def test_unpack_is_the_way_back(chance, bits, shape):
    q, codes, scales = random_parts(chance, bits, *shape)
    packed = pack(q, codes, scales, bits)
    back, back_codes = unpack(packed)
    assert torch.equal(back, q)
    assert torch.equal(back_codes, codes)
    assert packed.shape == shape
    assert packed.row_scales.shape == (*shape[:-2], padded(shape[-2]))
    expected = q.float() * codes.float().repeat_interleave(32, -1) * scales[..., None]
    torch.testing.assert_close(packed.dequantized(), expected)


@pytest.mark.parametrize("bits", BITS)
def test_its_size_is_that_of_the_empty_one(chance, bits):
    made = quantize(torch.randn(21, 128, generator=chance), bits)
    room = empty(21, 128, bits)
    assert (room.data.shape, room.row_scales.shape) == (made.data.shape, made.row_scales.shape)
    assert made.nbytes == 24 * (128 * bits // 8 + 4 + 4)


def test_a_member_of_a_stack_shares_its_memory(chance):
    stack = quantize(torch.randn(3, 9, 64, generator=chance), 4)
    assert len(stack) == 3
    assert stack[1].shape == (9, 64)
    assert stack[1].data.data_ptr() == stack.data[1].data_ptr()
    assert torch.equal(stack[2].dequantized(), stack.dequantized()[2])


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.083), (8, 0.0056)])
def test_gaussian_weights_keep_their_relative_error(chance, bits, bound):
    weight = torch.randn(256, 512, generator=chance)
    assert relative_error(quantize(weight, bits), weight) < bound


def test_searching_beats_rounding_by_the_largest(chance):
    weight = torch.randn(256, 512, generator=chance)
    searched, plain = (relative_error(quantize(weight, 4, search), weight) for search in (True, False))
    assert searched < 0.87 * plain


@pytest.mark.parametrize("bits", BITS)
def test_no_number_is_further_off_than_its_groups_step(chance, bits):
    weight = torch.randn(64, 256, generator=chance)
    packed = quantize(weight, bits, search=False)
    step = packed.row_scales[:, None] * unpack(packed)[1].float()
    # half a step of rounding, and what the rounded code makes of the largest
    off = (packed.dequantized() - weight).abs().view(64, -1, 32).amax(-1)
    assert bool((off <= step * (0.5 + (7 if bits == 4 else 127) * 0.5 / 20)).all())


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros(bits):
    weight = torch.zeros(8, 128)
    weight[3, 40] = -2.0
    packed = quantize(weight, bits)
    torch.testing.assert_close(packed.dequantized(), weight)


def test_a_great_negative_value_uses_the_eighth_step(chance):
    weight = torch.randn(8, 64, generator=chance).clamp(-1, 1) / 7
    weight[:, 5] = 1.0
    q, codes = unpack(quantize(weight, 4))
    assert bool((q[:, 5] * codes[:, 0] > 0).all())


@pytest.mark.parametrize("bits", BITS)
def test_slices_change_nothing(chance, bits, monkeypatch):
    import ernie_serve.kernels.packed as module

    weight = torch.randn(40, 64, generator=chance)
    whole = quantize(weight, bits)
    monkeypatch.setattr(module, "_SLICE", 64 * 16)
    cut = quantize(weight, bits)
    assert torch.equal(whole.data, cut.data)
    assert torch.equal(whole.row_scales, cut.row_scales)


def test_columns_that_are_no_whole_units_are_refused_by_name():
    with pytest.raises(SettingsError, match=r"layers\.0\.mlp has 96 columns.*multiple of 64"):
        require_packable(96, "layers.0.mlp")
    with pytest.raises(SettingsError, match="96 columns"):
        quantize(torch.zeros(8, 96), 4)


def relative_error(packed: Packed, weight: torch.Tensor) -> float:
    return float((packed.dequantized() - weight).norm() / weight.norm())
