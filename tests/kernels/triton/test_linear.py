import pytest
import torch

pytest.importorskip("triton")

from ernie_serve.kernels.cuda import CudaKernels
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
