"""Every verb that the CPU does its own way gives what the reference gives."""

import random

import pytest
import torch

from ernie_serve.kernels.cpu import CpuKernels
from ernie_serve.kernels.layout import Layout, Span
from ernie_serve.kernels.reference import ReferenceKernels

CPU, REFERENCE = CpuKernels(), ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16]


def same(actual, expected):
    loose = actual.dtype != torch.float32
    torch.testing.assert_close(actual, expected, rtol=2e-2 if loose else 1e-5, atol=3e-2 if loose else 1e-5)


@pytest.fixture
def noise():
    chance = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=chance).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 16, 64, 65, 200])
def test_linear(noise, rows, dtype):
    x, weight = noise(rows, 48, dtype=dtype), noise(72, 48, dtype=dtype) / 7
    same(CPU.linear(x, weight), REFERENCE.linear(x, weight))


def test_linear_of_a_slice_of_stacked_weights(noise):
    x, stacked = noise(7, 96)[:, ::2], noise(3, 72, 48)
    same(CPU.linear(x, stacked[1]), REFERENCE.linear(x, stacked[1]))


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 64, 200])
def test_linear_of_a_packed_matrix(noise, rows):
    x, weight = noise(rows, 48, dtype=torch.bfloat16), noise(72, 48, dtype=torch.bfloat16) / 7
    same(CPU.linear(x, CPU.pack(weight)), REFERENCE.linear(x, weight))


@pytest.mark.parametrize("kernels", [CPU, REFERENCE])
def test_what_has_no_better_order_is_packed_as_it_is(noise, kernels):
    weight = noise(72, 48)
    assert kernels.pack(weight) is weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_and_write(noise, dtype):
    qkv, slots = noise(5, (4 + 2 * 2) * 16, dtype=dtype), torch.tensor([3, 17, 0, 8, 31])
    frequencies = 1.0 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    rotary = REFERENCE.rotary(torch.tensor([0, 1, 77, 4096, 131071]), frequencies)
    outputs = []
    for kernels in (CPU, REFERENCE):
        k_cache, v_cache = (x.zero_() for x in kernels.empty_cache(4, 8, 2, 16, dtype, torch.device("cpu")))
        outputs.append((kernels.rope_and_write(qkv, rotary, k_cache, v_cache, slots, 4), k_cache, v_cache))
    for actual, expected in zip(*outputs, strict=True):
        same(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (5, 1), (3, 3)])
@pytest.mark.parametrize(
    "spans",
    [
        [(1, 1)],
        [(1, 50)],
        [(9, 9)],
        [(7, 40)],
        [(2, 3), (1, 33), (12, 12), (1, 1), (30, 70), (1, 64)],
    ],
    ids=str,
)
@pytest.mark.parametrize("shuffle", [False, True], ids=["run", "scattered"])
def test_attention(noise, spans, shuffle, heads, kv_heads, dtype):
    layout = laid_out(spans, block_size=4, shuffle=shuffle)
    q = noise(sum(count for count, _ in spans), heads, 16, dtype=dtype)
    k_cache, v_cache = noise(64, 4, kv_heads, 16, dtype=dtype), noise(64, 4, kv_heads, 16, dtype=dtype)
    same(CPU.attention(q, k_cache, v_cache, layout), REFERENCE.attention(q, k_cache, v_cache, layout))


@pytest.mark.parametrize("shuffle", [False, True], ids=["run", "shuffled"])
def test_attention_at_the_end_of_a_full_context(noise, shuffle):
    layout = laid_out([(50, 131_072), (1, 131_072)], block_size=64, shuffle=shuffle, num_blocks=4096)
    q = noise(51, 2, 8)
    k_cache, v_cache = noise(4096, 64, 1, 8), noise(4096, 64, 1, 8)
    same(CPU.attention(q, k_cache, v_cache, layout), REFERENCE.attention(q, k_cache, v_cache, layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 100])
def test_experts(noise, tokens, dtype):
    x, gate_up, down = (
        noise(tokens, 32, dtype=dtype),
        noise(8, 48, 32, dtype=dtype) / 6,
        noise(8, 32, 24, dtype=dtype) / 5,
    )
    router, bias = noise(8, 32), 0.1 * noise(8)
    weights, ids = CPU.route(x, router, bias, 3, 1e-12)
    expected = REFERENCE.experts(x, weights, ids, gate_up, down, None)
    same(CPU.experts(x, weights, ids, gate_up, down, None), expected)
    same(CPU.experts(x, weights, ids, CPU.pack(gate_up), CPU.pack(down), None), expected)


@pytest.mark.parametrize("kernels", [CPU, REFERENCE])
def test_a_negative_expert_id_routes_nowhere(noise, kernels):
    x, gate_up, down = noise(2, 32), noise(4, 48, 32), noise(4, 32, 24)
    weights, ids = torch.tensor([[0.5, 0.5], [0.3, 0.7]]), torch.tensor([[1, 2], [-1, -1]])
    y = kernels.experts(x, weights, ids, gate_up, down, None)
    same(y[:1], kernels.experts(x[:1], weights[:1], ids[:1], gate_up, down, None))
    assert not y[1].any()


def laid_out(spans, block_size, shuffle, num_blocks=64):
    """(query_len, context_len) pairs in a cache of so many blocks."""
    pool = list(range(num_blocks))
    if shuffle:
        random.Random(1).shuffle(pool)
    tables = torch.zeros(len(spans), num_blocks // 2, dtype=torch.int32)
    positions, slots, starts = [], [], [0]
    for r, (count, context) in enumerate(spans):
        blocks = [pool.pop(0) for _ in range(-(-context // block_size))]
        tables[r, : len(blocks)] = torch.tensor(blocks)
        mine = range(context - count, context)
        positions += mine
        slots += [blocks[p // block_size] * block_size + p % block_size for p in mine]
        starts.append(starts[-1] + count)
    return Layout(
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        block_tables=tables,
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([context for _, context in spans], dtype=torch.int32),
        spans=tuple(Span(start, *span) for start, span in zip(starts, spans, strict=False)),
        block_size=block_size,
    )
