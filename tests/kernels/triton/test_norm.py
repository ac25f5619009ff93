import pytest
import torch

pytest.importorskip("triton")

from ernie_serve.kernels.cuda import CudaKernels
from ernie_serve.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 128), (5, 96), (3, 40)])
def test_norm_with_and_without_a_sum(generator, dtype, shape):
    residual, delta = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(shape[1], generator=generator).to(dtype)
    # three roundings to 8 bits, which need not fall on the same side
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.025, "atol": 0.01}
    expected = ReferenceKernels().add_rms_norm(residual.clone(), delta.clone(), weight, 1e-5)
    for got, want in zip(CudaKernels().add_rms_norm(residual, delta, weight, 1e-5), expected, strict=True):
        torch.testing.assert_close(got, want, **close)
    torch.testing.assert_close(
        CudaKernels().rms_norm(residual, weight, 1e-5), ReferenceKernels().rms_norm(residual, weight, 1e-5), **close
    )


def test_what_is_pending_may_be_several_rows(generator):
    residual, weight = torch.randn(4, 64, generator=generator), torch.randn(64, generator=generator)
    parts = torch.randn(4, 8, 64, generator=generator)
    expected = ReferenceKernels().add_rms_norm(residual, parts.sum(1), weight, 1e-5)
    for got, want in zip(CudaKernels().add_rms_norm(residual, parts, weight, 1e-5), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_no_rows_are_no_work():
    residual, weight = torch.zeros(0, 64), torch.ones(64)
    assert [len(x) for x in CudaKernels().add_rms_norm(residual, torch.zeros(0, 3, 64), weight, 1e-5)] == [0, 0]
    assert len(CudaKernels().add_rms_norm(residual, torch.zeros(0, 64), weight, 1e-5)[1]) == 0
