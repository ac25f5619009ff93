import pytest
import torch

pytest.importorskip("triton")

from ernie_serve.kernels.cuda import CudaKernels
from ernie_serve.kernels.quantized import quantize
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.kernels.triton import linear

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize(("T", "M", "N"), [(1, 48, 64), (3, 80, 272), (16, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_rows_times_a_matrix(generator, T, M, N, dtype):
    x, weight = ((torch.randn(n, N, generator=generator) / N**0.25).to(dtype) for n in (T, M))
    assert linear.suits(x, weight)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(linear.linear(x, weight), x @ weight.T, rtol=tolerance, atol=tolerance)


def test_what_it_does_not_take_goes_to_torch(generator):
    wide = torch.randn(32, 64, generator=generator)
    assert not linear.suits(torch.zeros(17, 64), wide)
    assert not linear.suits(torch.zeros(0, 64), wide)
    assert not linear.suits(torch.zeros(64, 2).T, wide)
    assert not linear.suits(torch.zeros(2, 64), wide[:17])
    x = torch.randn(2, 64, generator=generator)
    torch.testing.assert_close(CudaKernels().linear(x, wide[:17]), x @ wide[:17].T)


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize(("T", "M", "N"), [(1, 48, 64), (3, 80, 272), (40, 48, 64), (140, 48, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_times_a_matrix_of_8_bits(generator, format, T, M, N, dtype):
    x = (torch.randn(T, N, generator=generator) / N**0.25).to(dtype)
    weight = quantize(torch.randn(M, N, generator=generator) / N**0.25, format)
    assert linear.suits(x, weight)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    want = ReferenceKernels().linear(x, weight)
    torch.testing.assert_close(CudaKernels().linear(x, weight), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize(("T", "M"), [(260, 48), (2, 17)])
def test_a_matrix_of_8_bits_is_made_wide_for_many_rows_and_odd_shapes(generator, format, T, M):
    x = torch.randn(T, 64, generator=generator)
    weight = quantize(torch.randn(M, 64, generator=generator), format)
    assert not linear.suits(x, weight)
    assert torch.equal(linear.widened(weight, torch.float32), weight.dequantized())
    torch.testing.assert_close(CudaKernels().linear(x, weight), ReferenceKernels().linear(x, weight))


def test_a_card_with_small_tiles_leaves_plain_matrices_to_cublas_and_reads_8_bits_itself(generator, monkeypatch):
    monkeypatch.setattr(linear, "has_large_tiles", lambda device: False)
    x, weight = torch.randn(2, 64, generator=generator), torch.randn(32, 64, generator=generator)
    assert not linear.suits(x, weight)
    assert linear.suits(x, quantize(weight, "int8"))
