import pytest
import torch

from ernie_serve.errors import SettingsError
from ernie_serve.kernels import quantized
from ernie_serve.kernels.quantized import _quantize as original
from ernie_serve.kernels.quantized import quantize
from ernie_serve.kernels.reference import ReferenceKernels


@pytest.mark.parametrize(("format", "error", "bits"), [("int8", 0.02, 8.5), ("fp8", 0.04, 8.5), ("int4", 0.15, 4.25)])
def test_numbers_come_back_about_as_they_were(format, error, bits):
    weight = torch.randn(3, 24, 256, generator=torch.Generator().manual_seed(2))
    weight[0, 0] = 0
    packed = quantize(weight, format)
    assert packed.shape == weight.shape
    assert packed.nbytes * 8 / weight.numel() <= bits
    back = packed.dequantized()
    assert (back - weight).norm() / weight.norm() < error
    assert torch.equal(quantize(weight, format)[1].dequantized(), back[1])


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_rows_are_rounded_some_at_a_time_to_the_same_numbers(format, monkeypatch):
    weight = torch.randn(2, 7, 256, generator=torch.Generator().manual_seed(3))
    whole = quantize(weight, format)
    seen = []
    monkeypatch.setattr(quantized, "AT_ONCE", 800)
    monkeypatch.setattr(quantized, "_quantize", lambda rows, f: seen.append(rows.numel()) or original(rows, f))
    parts = quantize(weight, format)
    assert max(seen) == 768
    assert torch.equal(parts.data.view(torch.uint8), whole.data.view(torch.uint8))
    assert torch.equal(parts.scales, whole.scales)


def test_what_fits_the_steps_is_exact():
    weight = torch.randint(-7, 8, (4, 256)).float()
    weight[:, ::64] = -8
    assert torch.equal(quantize(weight, "int4").dequantized(), weight)


def test_int4_refuses_columns_that_are_no_whole_units():
    with pytest.raises(SettingsError, match="multiple of 128"):
        quantize(torch.zeros(2, 192), "int4")


def test_the_reference_multiplies_by_what_the_numbers_stand_for():
    packed = quantize(torch.randn(8, 128), "fp8")
    x = torch.randn(3, 128)
    torch.testing.assert_close(ReferenceKernels().linear(x, packed), x @ packed.dequantized().T)
    torch.testing.assert_close(
        ReferenceKernels().embedding(torch.tensor([5, 0]), packed, torch.float32), packed.dequantized()[[5, 0]]
    )
