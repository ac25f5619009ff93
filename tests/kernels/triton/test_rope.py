import pytest
import torch

pytest.importorskip("triton")

from ernie_serve.kernels.cuda import CudaKernels
from ernie_serve.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(5, 1, 16), (4, 2, 12)])
def test_queries_turn_and_the_cache_gets_keys_and_values(generator, dtype, cache_dtype, heads, kv_heads, size):
    T = 3
    qkv = torch.randn(T, (heads + 2 * kv_heads) * size, generator=generator).to(dtype)
    reference, kernels = ReferenceKernels(), CudaKernels()
    rotary = reference.rotary(torch.tensor([0, 7, 130]), torch.rand(size // 2, generator=generator))
    slots = torch.tensor([9, 0, 4])
    device = torch.device("cpu")
    want_cache, got_cache = (
        reference.empty_cache(3, 4, kv_heads, size, cache_dtype or dtype, device) for _ in range(2)
    )
    want = reference.rope_and_write(qkv, rotary, *want_cache, slots, heads)
    got = kernels.rope_and_write(qkv, rotary, *got_cache, slots, heads)
    torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-5)
    for one, other in zip(got_cache, want_cache, strict=True):
        one, other = (x.view(torch.int8)[..., :size] if cache_dtype == torch.int8 else x for x in (one, other))
        one, other = one.float(), other.float()
        if dtype == torch.float32 or cache_dtype is None:
            step = 1.0 if cache_dtype == torch.int8 else 1e-5
            torch.testing.assert_close(one, other, rtol=0.01 if dtype == torch.bfloat16 else 0, atol=step)
            assert cache_dtype is None or (one != other).float().mean() < 0.02
        else:  # bfloat16 may have fallen on the other side before, and then the next step of 8 bits is as right
            torch.testing.assert_close(one, other, rtol=0.13, atol=1.0 if cache_dtype == torch.int8 else 0.01)
            assert (one != other).float().mean() < 0.1


def test_int8_rows_bring_their_scale(generator):
    qkv = torch.randn(2, 3 * 8, generator=generator)
    reference = ReferenceKernels()
    rotary = reference.rotary(torch.tensor([1, 2]), torch.rand(4, generator=generator))
    caches = [reference.empty_cache(1, 2, 1, 8, torch.int8, torch.device("cpu")) for _ in range(2)]
    slots = torch.tensor([1, 0])
    reference.rope_and_write(qkv, rotary, *caches[0], slots, 1)
    CudaKernels().rope_and_write(qkv, rotary, *caches[1], slots, 1)
    for want, got in zip(*caches, strict=True):
        scales = [x[..., 8:].contiguous().view(torch.float32) for x in (want, got)]
        torch.testing.assert_close(scales[1], scales[0])


def test_a_padded_row_writes_nothing(generator):
    qkv = torch.randn(2, 3 * 8, generator=generator)
    kernels = CudaKernels()
    rotary = kernels.rotary(torch.tensor([1, 0]), torch.rand(4, generator=generator))
    k_cache, v_cache = kernels.empty_cache(1, 2, 1, 8, torch.float32, torch.device("cpu"))
    q = kernels.rope_and_write(qkv, rotary, k_cache, v_cache, torch.tensor([1, -1]), 1)
    assert not q.isnan().any()
    assert k_cache.view(2, 8).any(-1).tolist() == v_cache.view(2, 8).any(-1).tolist() == [False, True]
