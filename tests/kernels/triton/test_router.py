import pytest
import torch

pytest.importorskip("triton")

from ernie_serve.kernels.cuda import CudaKernels
from ernie_serve.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "N", "E", "A"), [(1, 96, 8, 3), (19, 64, 8, 2), (3, 300, 24, 6)])
def test_the_bias_takes_part_in_the_choice_only(generator, dtype, T, N, E, A):
    x = torch.randn(T, N, generator=generator).to(dtype)
    weight, bias = torch.randn(E, N, generator=generator) / N**0.5, torch.rand(E, generator=generator) / 10
    want, want_ids = ReferenceKernels().route(x, weight, bias, A, 1e-12)
    got, ids = CudaKernels().route(x, weight, bias, A, 1e-12)
    assert ids.tolist() == want_ids.tolist()
    torch.testing.assert_close(got, want, rtol=1e-4 if dtype == torch.float32 else 0.01, atol=1e-5)


def test_of_equals_the_lower_id_and_a_sum_that_is_too_small_is_raised():
    x, weight, bias = torch.ones(1, 32), torch.zeros(8, 32), torch.zeros(8)
    weights, ids = CudaKernels().route(x, weight, bias, 2, 0.5)
    assert ids.tolist() == [[0, 1]]
    assert weights.tolist() == [[0.25, 0.25]]


def test_padded_rows_go_to_no_expert(generator):
    x, weight = torch.randn(4, 32, generator=generator), torch.randn(8, 32, generator=generator)
    kernels, num_live = CudaKernels(), torch.tensor([3], dtype=torch.int32)
    with kernels.padded(num_live):
        _, ids = kernels.route(x, weight, torch.zeros(8), 2, 1e-12)
    assert (ids >= 0).all(-1).tolist() == [True, True, True, False]
    assert ids[3].tolist() == [-1, -1]
    assert (kernels.route(x, weight, torch.zeros(8), 2, 1e-12)[1] >= 0).all(), "only within the step that is padded"
