import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from ernie_serve.kernels import cuda, kv_format, prompt_attention
from ernie_serve.kernels import layout as layouts
from ernie_serve.kernels.cuda import CudaKernels
from ernie_serve.kernels.layout import Layout, Span
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.kernels.triton import attention
from ernie_serve.kernels.triton.attention import SPLITS, decode_attention, splits_for

CPU = torch.device("cpu")


class Made(TorchDispatchMode):
    """What operations make, views left out: each operation, and the shape, dtype and size of its tensors."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and not operation.is_view:
                self.tensors.append((operation, each.shape, each.dtype, each.nbytes))
        return out


def inputs(generator, lens, queries, page, H, K, D, dtype, cache_dtype=None):
    """Queries, a cache with NaN in all that nobody may read, and a layout with blocks in any order."""
    kernels = ReferenceKernels()
    counts = [-(-length // page) for length in lens]
    shuffled = (torch.randperm(sum(counts), generator=generator) + 1).int().split(counts)
    tables = torch.full((len(lens), max(counts)), 10**6, dtype=torch.int32)
    caches = kernels.empty_cache(sum(counts) + 1, page, K, D, cache_dtype or dtype, torch.device("cpu"))
    for cache in caches:
        cache.view(torch.uint8).fill_(255)  # no number in any dtype, nor as a scale
    for r, (length, blocks) in enumerate(zip(lens, shuffled, strict=True)):
        tables[r, : len(blocks)] = blocks
        for p in range(length):
            for cache in caches:
                row = torch.randn(K, D, generator=generator).to(dtype)
                cache[int(blocks[p // page]), p % page] = kv_format.stored(row, cache)
    starts = torch.tensor([0, *queries]).cumsum(0)
    positions = torch.cat([torch.arange(n - q, n) for n, q in zip(lens, queries, strict=True)])
    spans = tuple(Span(int(s), q, n) for s, q, n in zip(starts, queries, lens, strict=False))
    layout = Layout(positions, torch.zeros_like(positions), tables, starts.int(), torch.tensor(lens).int(), spans, page)
    return torch.randn(sum(queries), H, D, generator=generator).to(dtype), *caches, layout


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize(("page", "H", "K", "D"), [(16, 5, 1, 16), (4, 4, 2, 24), (64, 4, 2, 24), (128, 5, 1, 16)])
def test_each_split_gives_the_reference(generator, splits, page, H, K, D):
    q, k_cache, v_cache, layout = inputs(generator, [1, 150, 64], [1, 1, 1], page, H, K, D, torch.float32)
    want = ReferenceKernels().attention(q, k_cache, v_cache, layout)
    got = decode_attention(q, k_cache, v_cache, layout.block_tables, layout.context_lens, splits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn, torch.int8])
def test_bfloat16_and_caches_of_8_bits(generator, cache_dtype, page):
    q, k_cache, v_cache, layout = inputs(generator, [70, 3], [1, 1], page, 5, 1, 16, torch.bfloat16, cache_dtype)
    want = ReferenceKernels().attention(q, k_cache, v_cache, layout)
    torch.testing.assert_close(CudaKernels().attention(q, k_cache, v_cache, layout), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_prompts_and_decodes_in_one_step(generator, cache_dtype):
    q, k_cache, v_cache, layout = inputs(
        generator, [5, 33, 70, 9], [5, 1, 4, 1], 16, 4, 2, 16, torch.float32, cache_dtype
    )
    want = ReferenceKernels().attention(q, k_cache, v_cache, layout)
    torch.testing.assert_close(CudaKernels().attention(q, k_cache, v_cache, layout), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn, torch.int8])
def test_prompts_of_bfloat16_over_contexts_that_are_widened_some_at_a_time(generator, cache_dtype, monkeypatch):
    monkeypatch.setattr(cuda, "_WIDENED", 40)
    q, k_cache, v_cache, layout = inputs(generator, [5, 33, 70], [5, 1, 4], 16, 4, 2, 16, torch.bfloat16, cache_dtype)
    want = ReferenceKernels().attention(q, k_cache, v_cache, layout)
    torch.testing.assert_close(CudaKernels().attention(q, k_cache, v_cache, layout), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_long_context_of_8_bits_takes_no_more_than_its_result_and_a_piece(cache_dtype):
    """Counted on the meta device: 131,072 tokens of 4 heads of 128, which are 128 MiB in bfloat16."""
    shape = (2048, 64, 4, kv_format.width(128, cache_dtype))
    cache = torch.empty(shape, dtype=kv_format.element(cache_dtype), device="meta")
    slots = torch.empty(131072, dtype=torch.int64, device="meta")
    with Made() as made:
        found = CudaKernels()._context(cache, slots, torch.bfloat16)
    assert (found.shape, found.nbytes) == ((131072, 4, 128), 128 << 20)
    *_, second, largest = sorted(size for *_, size in made.tensors)
    assert largest == 128 << 20
    assert second <= 16 << 20, "float32 of 8,192 tokens"


def test_in_float32_no_more_scores_are_made_at_once_than_by_the_reference(generator):
    q, k_cache, v_cache, layout = inputs(generator, [40, 9], [30, 1], 16, 4, 2, 16, torch.float32)
    want = ReferenceKernels().attention(q, k_cache, v_cache, layout)
    assert torch.equal(CudaKernels().attention(q, k_cache, v_cache, layout), want)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_prompts_that_stand_side_by_side_are_one_call(generator, cache_dtype, monkeypatch):
    """Runs of two, parted by a request with one token, and a long prompt by itself, behind which another run begins."""
    monkeypatch.setattr(layouts, "LARGE", 300)
    lens, queries = [5, 33, 9, 70, 4, 20, 6, 7], [5, 3, 1, 4, 4, 20, 6, 2]
    q, k_cache, v_cache, layout = inputs(generator, lens, queries, 16, 4, 2, 16, torch.bfloat16, cache_dtype)
    calls = []

    def by_runs(q, keys, values, run):
        calls.append((run.query_starts.tolist(), run.context_starts.tolist()))
        return prompt_attention._one_by_one(q, keys, values, run)

    monkeypatch.setattr(prompt_attention, "takes_runs", lambda device: True)
    monkeypatch.setattr(prompt_attention, "_by_runs", by_runs)
    want = ReferenceKernels().attention(q, k_cache, v_cache, layout)
    prompt_attention._runs_well.cache_clear()
    try:
        got = CudaKernels().attention(q, k_cache, v_cache, layout)
    finally:
        prompt_attention._runs_well.cache_clear()
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    starts = [([0, 5, 8], [0, 5, 38]), ([0, 4, 8], [0, 70, 74]), ([0, 20], [0, 20]), ([0, 6, 8], [0, 6, 13])]
    assert calls[1:] == starts, "after the check"


def test_a_run_of_several_gathers_few_tokens(generator, monkeypatch):
    monkeypatch.setattr(layouts, "SHORT", 50)
    *_, layout = inputs(generator, [30, 20, 1, 70, 9, 41, 42], [2, 2, 1, 2, 2, 2, 2], 16, 4, 2, 16, torch.bfloat16)
    assert [[span.context_len for span in run.spans] for run in layout.runs] == [[30, 20], [70], [9, 41], [42]]


def test_nothing_of_a_run_is_brought_from_the_host(generator, monkeypatch):
    """A tensor from numbers of the host waits for all that a GPU has still to do."""
    *_, layout = inputs(generator, [30, 20, 70], [2, 2, 9], 16, 4, 2, 16, torch.bfloat16)
    monkeypatch.setattr(torch, "tensor", None)
    assert [len(run.slots) for run in layout.runs] == [120]


def test_where_contexts_lie_is_found_once_a_step_and_not_in_every_layer(generator):
    q, k_cache, v_cache, layout = inputs(generator, [5, 33, 70], [5, 33, 70], 16, 4, 2, 16, torch.bfloat16)
    with Made() as made:
        for _ in range(3):
            CudaKernels().attention(q, k_cache, v_cache, layout)
    assert [what for what, *_ in made.tensors].count(torch.ops.aten.searchsorted.Tensor) == 1


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("splits", [1, 4])
def test_a_padded_row_has_no_context_and_yields_zeros(generator, splits):
    q, k_cache, v_cache, layout = inputs(generator, [20, 7], [1, 1], 16, 2, 1, 16, torch.float32)
    lens = torch.tensor([20, 0], dtype=torch.int32)
    got = decode_attention(q, k_cache, v_cache, layout.block_tables, lens, splits)
    assert not got[1].any()
    torch.testing.assert_close(
        got[0], ReferenceKernels().attention(q, k_cache, v_cache, layout)[0], rtol=1e-4, atol=1e-5
    )


def test_a_long_context_is_split_however_many_requests_there_are():
    assert splits_for(1, 4, 1024, CPU) == 16
    assert splits_for(32, 4, 2048, CPU) == 4
    assert splits_for(64, 4, 2048, CPU) == 1, "nearly two programs on each processor are enough"
    assert splits_for(256, 4, 2048, CPU) == 1
    assert splits_for(256, 4, 131072, CPU) == 16
    assert splits_for(1, 4, 131072, CPU) == 64
    assert splits_for(1, 4, 1, CPU) == 1


def test_a_card_with_fewer_processors_splits_less(monkeypatch):
    monkeypatch.setattr(attention, "num_processors", lambda device: 58)
    assert splits_for(16, 4, 2048, CPU) == 4
    assert splits_for(32, 4, 2048, CPU) == 1, "where 132 processors would split"


def test_what_is_made_for_the_requests_with_one_token_is_made_once_a_step(generator, monkeypatch):
    """A tensor from numbers of the host waits for all that a GPU has still to do: in every layer that is a pause."""
    q, k_cache, v_cache, layout = inputs(generator, [5, 33, 9], [5, 1, 1], 16, 4, 2, 16, torch.float32)
    kernels = CudaKernels()
    kernels.attention(q, k_cache, v_cache, layout)
    monkeypatch.setattr(torch, "tensor", None)
    kernels.attention(q, k_cache, v_cache, layout)
