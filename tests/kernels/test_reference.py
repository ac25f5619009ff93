"""The reference verbs against their definitions, written out with plain numbers."""

import math

import pytest
import torch

from ernie_serve.kernels import kv_format
from ernie_serve.kernels.layout import Layout, Span
from ernie_serve.kernels.packed import quantize
from ernie_serve.kernels.reference import ReferenceKernels

K = ReferenceKernels()


@pytest.fixture
def noise():
    chance = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=chance)


def test_rms_norm(noise):
    x, weight = noise(3, 8), noise(8)
    for row, out in zip(x.tolist(), K.rms_norm(x, weight, 1e-5).tolist(), strict=True):
        root = math.sqrt(sum(v * v for v in row) / 8 + 1e-5)
        assert out == pytest.approx([v / root * w for v, w in zip(row, weight.tolist(), strict=True)], abs=1e-5)


def test_rms_norm_has_its_statistics_in_float32():
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # its squares overflow float16
    assert torch.equal(K.rms_norm(x, torch.ones(4096, dtype=torch.float16), 1e-5), torch.ones_like(x))


def test_add_rms_norm_adds_before_it_norms(noise):
    a, b, weight = noise(2, 8), noise(2, 8), noise(8)
    total, normed = K.add_rms_norm(a.clone(), b.clone(), weight, 1e-5)
    assert torch.equal(total, a + b)
    assert torch.equal(normed, K.rms_norm(a + b, weight, 1e-5))


def test_rope_turns_neighbours_by_position_times_frequency_and_writes_to_slots(noise):
    qkv, positions, slots = noise(2, (2 + 2) * 4), torch.tensor([3, 131071]), torch.tensor([5, 2])
    frequencies = torch.tensor([1.0, 0.001])
    k_cache, v_cache = K.empty_cache(2, 4, 1, 4, torch.float32, torch.device("cpu"))
    q = K.rope_and_write(qkv, K.rotary(positions, frequencies), k_cache, v_cache, slots, 2)
    heads = qkv.view(2, 4, 4)

    def turned(head, position):
        out = []
        for pair, frequency in enumerate(frequencies.tolist()):
            angle = torch.tensor(float(position)) * frequency
            a, b = head[2 * pair].item(), head[2 * pair + 1].item()
            out += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
        return pytest.approx(out, abs=1e-5)

    for t, position in enumerate(positions.tolist()):
        assert q[t, 0].tolist() == turned(heads[t, 0], position)
        assert q[t, 1].tolist() == turned(heads[t, 1], position)
        assert k_cache.view(8, 4)[slots[t]].tolist() == turned(heads[t, 2], position)
        assert v_cache.view(8, 4)[slots[t]].tolist() == heads[t, 3].tolist()
    assert not k_cache.view(8, 4)[[0, 1, 3, 4, 6, 7]].any()


def test_attention_is_causal_grouped_and_reads_its_own_blocks(noise):
    k_cache, v_cache, q = noise(4, 2, 2, 4), noise(4, 2, 2, 4), noise(3, 4, 4)
    layout = Layout(
        positions=torch.tensor([2, 3, 0]),
        slots=torch.tensor([2, 3, 6]),
        block_tables=torch.tensor([[2, 1], [3, 0]], dtype=torch.int32),
        query_starts=torch.tensor([0, 2, 3], dtype=torch.int32),
        context_lens=torch.tensor([4, 1], dtype=torch.int32),
        spans=(Span(0, 2, 4), Span(2, 1, 1)),
        block_size=2,
    )
    out = K.attention(q, k_cache, v_cache, layout).view(3, 4, 4)
    for t, blocks, length in ((0, [2, 1], 3), (1, [2, 1], 4), (2, [3], 1)):
        for head in range(4):
            keys, values = (c[blocks].reshape(-1, 2, 4)[:length, head // 2] for c in (k_cache, v_cache))
            scores = [sum(a * b for a, b in zip(q[t, head].tolist(), k, strict=True)) / 2 for k in keys.tolist()]
            shares = [math.exp(s) for s in scores]
            expected = sum(s * v for s, v in zip(shares, values, strict=True)) / sum(shares)
            torch.testing.assert_close(out[t, head], expected)


def test_attention_in_slices_is_attention(noise, monkeypatch):
    import ernie_serve.kernels.reference as module

    k_cache, v_cache, q = noise(1, 64, 2, 8), noise(1, 64, 2, 8), noise(30, 4, 8)
    layout = Layout(
        positions=torch.arange(34, 64),
        slots=torch.arange(34, 64),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        query_starts=torch.tensor([0, 30], dtype=torch.int32),
        context_lens=torch.tensor([64], dtype=torch.int32),
        spans=(Span(0, 30, 64),),
        block_size=64,
    )
    whole = K.attention(q, k_cache, v_cache, layout)
    monkeypatch.setattr(module, "_MAX_SCORES", 7 * 4 * 64)
    torch.testing.assert_close(K.attention(q, k_cache, v_cache, layout), whole)


def test_swiglu_takes_the_gate_first():
    gate_up = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    expected = [1 / (1 + math.exp(-1)) * 3, -2 / (1 + math.exp(2)) * 4]
    assert K.swiglu(gate_up)[0].tolist() == pytest.approx(expected)


def test_the_router_chooses_with_the_bias_and_weighs_without_it():
    x, weight = torch.eye(3)[:1], torch.tensor([[2.0, 0, 0], [1.0, 0, 0], [0.5, 0, 0], [0.0, 0, 0]])
    weights, ids = K.route(x, weight, torch.tensor([0.0, -1.0, 0.0, 0.5]), 2, 1e-12)
    p = [math.exp(v) for v in (2.0, 1.0, 0.5, 0.0)]
    found = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    assert found == {0: pytest.approx(p[0] / (p[0] + p[3])), 3: pytest.approx(p[3] / (p[0] + p[3]))}


def test_the_routers_divisor_has_a_floor():
    weights, ids = K.route(torch.ones(1, 1), torch.tensor([[30.0], [0.0], [0.0]]), torch.tensor([-9.0, 0, 0]), 2, 1e-3)
    assert sorted(ids[0].tolist()) == [1, 2]
    assert weights[0].tolist() == pytest.approx([math.exp(-30) / 1e-3] * 2)


def test_the_router_decides_in_float32_for_16_bit_activations(noise):
    x, weight, bias = noise(64, 32).bfloat16(), noise(8, 32), 0.01 * noise(8)
    weights, ids = K.route(x, weight, bias, 3, 1e-12)
    wide, wide_ids = K.route(x.float(), weight, bias, 3, 1e-12)
    assert torch.equal(ids, wide_ids)
    assert torch.equal(weights, wide.bfloat16())


def test_experts_sum_their_weighted_mlps(noise):
    x, gate_up, down = noise(3, 8), noise(4, 12, 8), noise(4, 8, 6)
    weights, ids = torch.rand(3, 2), torch.tensor([[0, 3], [3, 1], [0, 1]])
    y = K.experts(x, weights, ids, gate_up, down, None)
    for t in range(3):
        expected = torch.zeros(8)
        for weight, expert in zip(weights[t], ids[t], strict=True):
            gate, up = gate_up[expert][:6] @ x[t], gate_up[expert][6:] @ x[t]
            expected += weight * (down[expert] @ (gate * torch.sigmoid(gate) * up))
        torch.testing.assert_close(y[t], expected)


def test_the_shared_mlp_is_added_to_the_routed_sum(noise):
    x, gate_up, down, shared = noise(3, 8), noise(4, 12, 8), noise(4, 8, 6), (noise(20, 8), noise(8, 10))
    weights, ids = torch.rand(3, 2), torch.tensor([[0, 3], [3, 1], [-1, -1]])
    routed = K.experts(x, weights, ids, gate_up, down, None)
    beside = K.linear(K.swiglu(K.linear(x, shared[0])), shared[1])
    torch.testing.assert_close(K.experts(x, weights, ids, gate_up, down, shared), routed + beside)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_matrices_are_their_numbers(noise, bits):
    x, weight = noise(5, 64), quantize(noise(13, 64), bits)
    torch.testing.assert_close(K.linear(x, weight), x @ weight.dequantized().T)
    ids = torch.tensor([12, 0, 7, 8, 7])
    assert torch.equal(K.embedding(ids, weight, torch.bfloat16), weight.dequantized(torch.bfloat16)[ids])
    gate_up, down = quantize(noise(4, 128, 64), bits), quantize(noise(4, 64, 64), 8)
    weights, ids = torch.rand(5, 2), torch.randint(0, 4, (5, 2))
    shared = gate_up[1], down[2]
    expected = K.experts(
        x, weights, ids, gate_up.dequantized(), down.dequantized(), tuple(m.dequantized() for m in shared)
    )
    torch.testing.assert_close(K.experts(x, weights, ids, gate_up, down, shared), expected)


def test_an_8_bit_cache_keeps_what_it_is_given_to_half_a_step(noise):
    cache, _ = K.empty_cache(2, 4, 3, 16, torch.int8, torch.device("cpu"))
    assert (cache.dtype, cache.shape) == (torch.uint8, (2, 4, 3, 20))
    assert cache[0, 0, 0].nbytes == kv_format.row_bytes(16, torch.int8) == 20
    assert kv_format.row_bytes(16, torch.bfloat16) == 32
    x = noise(7, 3, 16)
    x[2, 1] = 0
    back = kv_format.numbers(kv_format.stored(x, cache))
    assert bool(((back - x).abs() <= x.abs().amax(-1, keepdim=True) / 127 * 0.5001).all())


def test_attention_over_an_8_bit_cache_reads_the_numbers_it_keeps(noise):
    qkv, slots = noise(5, (4 + 2 * 2) * 8), torch.arange(5)
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])
    layout = Layout(
        positions=torch.arange(5),
        slots=slots,
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        query_starts=torch.tensor([0, 5], dtype=torch.int32),
        context_lens=torch.tensor([5], dtype=torch.int32),
        spans=(Span(0, 5, 5),),
        block_size=8,
    )
    eight = K.empty_cache(1, 8, 2, 8, torch.int8, torch.device("cpu"))
    q = K.rope_and_write(qkv, K.rotary(layout.positions, frequencies), *eight, slots, 4)
    wide = [kv_format.numbers(cache) for cache in eight]
    torch.testing.assert_close(K.attention(q, *eight, layout), K.attention(q, *wide, layout))
