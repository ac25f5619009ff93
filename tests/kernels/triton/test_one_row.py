"""A step of one row: what its fused kernels give is what the reference's verbs give one after the other."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from ernie_serve.kernels import fused_cuda
from ernie_serve.kernels.fused_cuda import FusedCudaKernels
from ernie_serve.kernels.layout import Layout, Span
from ernie_serve.kernels.quantized import quantize
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.kernels.triton import experts_of_one, norm, one_row, rope, router

pytestmark = pytest.mark.usefixtures("poison")

CPU = torch.device("cpu")
EPS = 1e-5
FORMATS = [None, "int8", "fp8"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def alone(monkeypatch):
    """Nothing of what is fused may be launched by itself."""

    def launched(*args, **named):
        raise AssertionError("a kernel of its own")

    for module, name in ((norm, "add_rms_norm"), (rope, "rope_and_write"), (router, "route")):
        monkeypatch.setattr(module, name, launched)


def near(dtype):
    return {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}


def matrix(generator, format, dtype, *shape):
    made = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)
    return quantize(made, format) if format else made


def row(generator, N, dtype, scale=1.0):
    return (torch.randn(1, N, generator=generator) * scale).to(dtype)


def one_token(length, page, slot):
    blocks = -(-length // page)
    return Layout(
        positions=torch.tensor([length - 1]),
        slots=torch.tensor([slot]),
        block_tables=torch.arange(blocks, dtype=torch.int32)[None],
        query_starts=torch.tensor([0, 1], dtype=torch.int32),
        context_lens=torch.tensor([length], dtype=torch.int32),
        spans=(Span(0, 1, length),),
        block_size=page,
    )


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "M"), [(16, 8), (64, 24), (80, 16), (272, 8)])
def test_a_norm_and_its_product(generator, N, M, dtype, format):
    x, weight, scale = row(generator, N, dtype, 3), matrix(generator, format, dtype, M, N), row(generator, N, dtype)[0]
    stream, got = FusedCudaKernels().norm_linear(x, None, scale, EPS, weight)
    assert stream is x
    torch.testing.assert_close(got, ReferenceKernels().norm_linear(x, None, scale, EPS, weight)[1], **near(dtype))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_added_to_the_stream(generator, dtype, format):
    x, weight, stream = row(generator, 80, dtype), matrix(generator, format, dtype, 24, 80), row(generator, 24, dtype)
    got, pending = FusedCudaKernels().add_linear(stream, x, weight)
    assert pending is None
    torch.testing.assert_close(got, stream + ReferenceKernels().linear(x, weight), **near(dtype))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("dtype", "cache_dtype"), [(d, c) for d in DTYPES for c in (d, torch.float8_e4m3fn)])
def test_attention_turns_and_writes_what_it_multiplies(generator, dtype, cache_dtype, format):
    args, caches, layout = one_attention(generator, dtype, cache_dtype, format)
    found = []
    for kernels in (ReferenceKernels(), FusedCudaKernels()):
        own = [cache.clone() for cache in caches]
        stream, heads = kernels.norm_attend(*args, *own, layout, 4)
        assert stream is args[0]
        found.append((heads, *(cache.float() for cache in own)))
    for got, want in zip(*reversed(found), strict=True):
        torch.testing.assert_close(got, want, **(near(dtype) if cache_dtype == dtype else {"rtol": 0.13, "atol": 0.03}))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float8_e4m3fn])
def test_a_row_that_is_none_writes_nothing_and_attends_to_nothing(generator, cache_dtype):
    """As a step is recorded."""
    args, caches, layout = one_attention(generator, torch.float32, cache_dtype, None)
    nobody = replace(layout, slots=torch.tensor([-1]), context_lens=torch.tensor([0], dtype=torch.int32))
    own = [cache.clone() for cache in caches]
    _, heads = FusedCudaKernels().norm_attend(*args, *own, nobody, 4)
    assert not heads.any()
    for cache, before in zip(own, caches, strict=True):
        assert torch.equal(cache.view(torch.uint8), before.view(torch.uint8))


def one_attention(generator, dtype, cache_dtype, format, N=48, H=4, K=2, D=16, page=8, length=38):
    """What comes before the caches, two of them with numbers in them, and where the one token stands."""
    x, scale = row(generator, N, dtype), row(generator, N, dtype, 0.5)[0]  # so that no score decides alone
    rotary = ReferenceKernels().rotary(torch.tensor([length - 1]), torch.rand(D // 2, generator=generator))
    weight = matrix(generator, format, dtype, (H + 2 * K) * D, N)
    caches = ReferenceKernels().empty_cache(5, page, K, D, cache_dtype, CPU)
    for cache in caches:
        cache.copy_(torch.randn(cache.shape, generator=generator))
    return (x, None, scale, EPS, weight, rotary), caches, one_token(length, page, length - 1)


def test_a_scale_for_a_whole_head_is_written_by_a_kernel_that_has_it(generator):
    N, H, K, D = 48, 2, 1, 16
    x, scale = row(generator, N, torch.float32), row(generator, N, torch.float32)[0]
    weight = matrix(generator, None, torch.float32, (H + 2 * K) * D, N)
    rotary = ReferenceKernels().rotary(torch.tensor([3]), torch.rand(D // 2, generator=generator))
    found = []
    for kernels in (ReferenceKernels(), FusedCudaKernels()):
        caches = kernels.empty_cache(1, 8, K, D, torch.int8, CPU)
        found.append(kernels.norm_attend(x, None, scale, EPS, weight, rotary, *caches, one_token(4, 8, 3), H)[1])
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=0.02)


def moe(generator, format, dtype, shared, N=128, E=6, width=128):
    router_weight, bias = torch.randn(E, N, generator=generator), torch.randn(E, generator=generator) * 0.1
    both = None
    if shared:
        both = matrix(generator, shared, dtype, 4 * width, N), matrix(generator, shared, dtype, N, 2 * width)
    stacks = (matrix(generator, format, dtype, E, 2 * width, N), matrix(generator, format, dtype, E, N, width))
    return row(generator, N, dtype)[0], EPS, router_weight, bias, 3, 1e-12, *stacks, both


def summed(stream, pending):
    if pending is None:
        return stream
    pending = pending.float().sum(1) if pending.dim() == 3 else pending.float()
    return stream.float() + pending


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "shared"), [(None, None), ("int8", "int8"), ("fp8", "fp8"), ("int4", "int4")])
def test_experts_are_chosen_and_summed_on_the_way(generator, format, shared, dtype):
    for _ in range(3):
        x, args = row(generator, 128, dtype), moe(generator, format, dtype, shared)
        got = FusedCudaKernels().norm_moe(x, None, *args)
        assert (got[1] is None) == (format != "int4")
        want = summed(*ReferenceKernels().norm_moe(x, None, *args)).float()
        if dtype == torch.float32:
            torch.testing.assert_close(summed(*got), want, **near(dtype))
        else:  # what lies between is rounded several times, in bfloat16 and in half precision
            assert (summed(*got).float() - want).abs().max() < 0.025 * want.abs().max()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("N", "E", "width"), [(80, 8, 48), (272, 16, 16)])
def test_widths_that_are_no_power_of_two_and_a_shared_mlp_in_16_bit(generator, N, E, width):
    args = list(moe(generator, None, torch.float32, None, N, E, width))
    args[-1] = (
        matrix(generator, None, torch.float32, 4 * width, N),
        matrix(generator, None, torch.float32, N, 2 * width),
    )
    x = row(generator, N, torch.float32)
    got, pending = FusedCudaKernels().norm_moe(x, None, *args)
    assert pending is None
    torch.testing.assert_close(got, summed(*ReferenceKernels().norm_moe(x, None, *args)), **near(torch.float32))


@pytest.mark.parametrize("parts", [None, 3])
def test_what_is_pending_is_added_first(generator, parts):
    x, args = row(generator, 128, torch.float32), moe(generator, "int8", torch.float32, None)
    pending = torch.randn(1, *([parts] if parts else []), 128, generator=generator)
    scale, eps, *_ = args
    weight = matrix(generator, None, torch.float32, 24, 128)
    fused, reference, whole = FusedCudaKernels(), ReferenceKernels(), pending if parts is None else pending.sum(1)
    for one, other in zip(
        fused.norm_linear(x, pending, scale, eps, weight),
        reference.norm_linear(x, whole, scale, eps, weight),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **near(torch.float32))
    torch.testing.assert_close(
        summed(*fused.norm_moe(x, pending, *args)), summed(*reference.norm_moe(x, whole, *args)), **near(torch.float32)
    )


def test_a_width_of_many_small_tiles_is_left_to_the_kernel_that_loops(generator):
    args = list(moe(generator, None, torch.float32, None, width=1040))
    x = row(generator, 128, torch.float32)
    got = FusedCudaKernels().norm_moe(x, None, *args)
    torch.testing.assert_close(summed(*got), summed(*ReferenceKernels().norm_moe(x, None, *args)), rtol=1e-3, atol=1e-3)
    both = torch.empty(0, 3072), torch.empty(128, 3072)
    assert experts_of_one.suits(torch.empty(64, 128, 1536), 6, both), "those of the 21B"
    assert not experts_of_one.suits(args[7], 3, None), "or compiling takes minutes"


def test_several_rows_and_what_fits_no_program_go_the_other_way(generator, monkeypatch):
    weight = torch.randn(24, 64, generator=generator)
    assert one_row.suits(torch.zeros(1, 64), weight)
    assert not one_row.suits(torch.zeros(2, 64), weight)
    assert not one_row.suits(torch.zeros(0, 64), weight)
    assert not one_row.suits(torch.zeros(1, 64), weight[:22]), "no whole programs"
    assert not one_row.suits(torch.zeros(1, 64), weight.half())
    assert not one_row.suits(torch.zeros(1, 4096), torch.zeros(8, 4096)), "too deep for registers"
    assert not one_row.suits(torch.zeros(1, 16), torch.zeros(103424, 16)), "a head has too many programs"
    for name in ("linear", "add_linear", "linear_and_turn", "scores"):
        monkeypatch.setattr(fused_cuda.one_row, name, None)
    x, kernels = torch.randn(3, 128, generator=generator), FusedCudaKernels()
    args = moe(generator, "fp8", torch.float32, "fp8")
    torch.testing.assert_close(
        summed(*kernels.norm_moe(x, None, *args)),
        summed(*ReferenceKernels().norm_moe(x, None, *args)),
        rtol=1e-3,
        atol=1e-4,
    )
