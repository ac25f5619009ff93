import pytest
import torch

pytest.importorskip("triton")

from ernie_serve.kernels.cuda import CudaKernels
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.kernels.triton.prompt import combine

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2 * 40), (2, 2 * 2100)])
def test_gate_and_up_become_one_row(generator, dtype, shape):
    x = torch.randn(shape, generator=generator).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(CudaKernels().swiglu(x), ReferenceKernels().swiglu(x), rtol=tolerance, atol=tolerance)
    assert CudaKernels().swiglu(x[:0]).shape == (0, shape[1] // 2)


@pytest.mark.parametrize("has_base", [True, False])
def test_a_token_gets_the_weighted_sum_of_its_rows(generator, has_base):
    rows, weights = torch.randn(7, 1100, generator=generator), torch.rand(3, 2, generator=generator)
    places = torch.tensor([[6, 0], [3, -1], [-1, -1]])
    base = torch.randn(3, 1100, generator=generator) if has_base else None
    want = torch.stack((rows[6] * weights[0, 0] + rows[0] * weights[0, 1], rows[3] * weights[1, 0], torch.zeros(1100)))
    torch.testing.assert_close(combine(rows, places, weights, base), want if base is None else want + base)
