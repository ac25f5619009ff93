import pytest
import torch

pytest.importorskip("triton")

from ernie_serve.kernels.cuda import CudaKernels
from ernie_serve.kernels.quantized import quantize
from ernie_serve.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.usefixtures("poison")


def inputs(generator, T, A, E, N, width, shared, dtype=torch.float32, format=None):
    """Arguments of the verb; the last token routes nowhere when there are several."""

    def weight(*shape):
        made = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)
        return quantize(made, format) if format else made

    x = torch.randn(T, N, generator=generator).to(dtype)
    chances, ids = torch.rand(T, E, generator=generator).topk(A)
    ids = ids.int()
    if T > 1:
        ids[-1] = -1
    both = (weight(2 * shared * width, N), weight(N, shared * width)) if shared else None
    return x, chances.to(dtype), ids, weight(E, 2 * width, N), weight(E, N, width), both


def check(args, rtol, atol):
    want = ReferenceKernels().experts(*args)
    got = CudaKernels().experts(*args)
    assert not got.isnan().any(), "a gap in the output"
    got = got.float().sum(1) if got.dim() == 3 else got.float()
    torch.testing.assert_close(got, want.float(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("T", [1, 4, 16, 20])
@pytest.mark.parametrize("shared", [0, 2])
def test_rows_meet_their_experts_and_the_shared_mlp(generator, T, shared):
    check(inputs(generator, T, 3, 6, 64, 32, shared), 1e-4, 1e-5)


def test_widths_that_are_no_multiple_of_a_tile(generator):
    check(inputs(generator, 3, 2, 4, 40, 24, 1), 1e-4, 1e-5)
    check(inputs(generator, 18, 2, 4, 40, 24, 1), 1e-4, 1e-5)


@pytest.mark.parametrize("T", [2, 18])
def test_bfloat16(generator, T):
    check(inputs(generator, T, 2, 4, 64, 32, 2, torch.bfloat16), 0.03, 0.03)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
@pytest.mark.parametrize(("T", "dtype"), [(1, torch.bfloat16), (3, torch.float32), (18, torch.bfloat16)])
def test_quantized_weights(generator, T, dtype, format):
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    check(inputs(generator, T, 2, 4, 128, 128, 2, dtype, format), tolerance, tolerance)


def test_a_shared_mlp_in_another_format_is_computed_by_itself(generator):
    *routed, both = inputs(generator, 3, 2, 4, 128, 128, 1)
    args = [*routed[:3], quantize(routed[3], "int8"), quantize(routed[4], "int8"), both]
    check(args, 1e-4, 1e-4)


@pytest.mark.parametrize("shared", [0, 2])
def test_a_prompt_goes_through_grouped_gemms(generator, monkeypatch, shared):
    monkeypatch.setattr("ernie_serve.kernels.cuda._MOST_BY_TRITON", 8)
    check(inputs(generator, 24, 2, 4, 64, 32, shared, torch.bfloat16), 0.03, 0.03)


def test_a_recorded_step_of_many_rows_takes_no_grouped_gemms_for_torchs_may_wait_for_the_host(generator, monkeypatch):
    monkeypatch.setattr("ernie_serve.kernels.cuda._MOST_BY_TRITON", 8)
    monkeypatch.setattr("torch.nn.functional.grouped_mm", lambda *_, **__: pytest.fail("no step with it is recorded"))
    args = inputs(generator, 24, 2, 4, 64, 32, 2, torch.bfloat16)
    want = ReferenceKernels().experts(*args)
    kernels = CudaKernels()
    with kernels.padded(torch.tensor([23], dtype=torch.int32)):
        got = kernels.experts(*args).float().sum(1)
    torch.testing.assert_close(got, want.float(), rtol=0.03, atol=0.03)


def test_a_prompt_with_quantized_weights_leaves_the_sum_to_the_norm(generator, monkeypatch):
    monkeypatch.setattr("ernie_serve.kernels.cuda._MOST_BY_TRITON", 8)
    args = inputs(generator, 10, 2, 4, 128, 128, 2, torch.bfloat16, "int8")
    check(args, 0.03, 0.03)
    assert CudaKernels().experts(*args).shape == (10, 2 + 2, 128), "no pass over float32 copies of them"


def test_the_same_batch_gives_the_same_bits_wherever_a_token_stands_and_alone(generator):
    x, chances, ids, gate_up, down, both = inputs(generator, 6, 2, 4, 64, 32, 1)
    kernels = CudaKernels()
    whole = kernels.experts(x, chances, ids, gate_up, down, both)
    turned = kernels.experts(x.flip(0), chances.flip(0), ids.flip(0), gate_up, down, both)
    assert torch.equal(whole, turned.flip(0))
    for t in (0, 5):  # the last routes nowhere
        alone = kernels.experts(x[t : t + 1], chances[t : t + 1], ids[t : t + 1], gate_up, down, both)
        assert torch.equal(alone, whole[t : t + 1])
