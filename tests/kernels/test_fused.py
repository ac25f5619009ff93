"""Attention over the cache and the small verbs of `cpu.cpp` give what the reference gives."""

from dataclasses import replace

import pytest
import torch

from ernie_serve.kernels import cpu, kv_format, panels
from ernie_serve.kernels.fused import FusedCpuKernels
from ernie_serve.kernels.layout import Layout, Span
from ernie_serve.kernels.packed import quantize
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.packing import matrices, pack, set_matrix

REFERENCE = ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16]
CACHES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture(params=["native", "portable"])
def fused(request):
    return FusedCpuKernels(request.getfixturevalue(request.param))


@pytest.fixture
def noise():
    chance = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=chance).to(dtype)


def same(actual, expected):
    loose = expected.dtype != torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-2 if loose else 1e-5, atol=2e-2 if loose else 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 40, 43, 5])
def test_norms(fused, noise, size, dtype):
    for tokens in (0, 1, 2, 33):
        x, delta, weight = noise(tokens, size, dtype=dtype), noise(tokens, size, dtype=dtype), noise(size, dtype=dtype)
        same(fused.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
        total, normed = REFERENCE.add_rms_norm(x, delta, weight, 1e-5)
        ours, ours_normed = fused.add_rms_norm(x.clone(), delta.clone(), weight, 1e-5)
        assert torch.equal(ours, total)
        same(ours_normed, normed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 40, 24])
def test_swiglu(fused, noise, size, dtype):
    for tokens in (0, 1, 3, 33):
        gate_up = 3 * noise(tokens, size, dtype=dtype)
        same(fused.swiglu(gate_up), REFERENCE.swiglu(gate_up))


def test_rotary(fused):
    frequencies = 1.0 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    for positions in (torch.arange(0), torch.tensor([131071]), torch.arange(0, 131072, 911)):
        expected = REFERENCE.rotary(positions, frequencies)
        torch.testing.assert_close(fused.rotary(positions, frequencies), expected, rtol=0, atol=1e-6)


def test_a_norm_takes_rows_that_do_not_lie_together(fused, noise):
    wide, delta, weight = noise(3, 80), noise(3, 40), noise(40)
    total, normed = REFERENCE.add_rms_norm(wide[:, :40], delta, weight, 1e-5)
    stream = wide.clone()[:, :40]
    ours, ours_normed = fused.add_rms_norm(stream, delta, weight, 1e-5)
    assert torch.equal(ours, total)
    same(ours_normed, normed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 40])
def test_route(fused, noise, size, dtype):
    weight, bias = noise(10, size), 0.1 * noise(10)
    for tokens in (0, 1, 2, 3, 4, 5, 33):
        x = noise(tokens, size, dtype=dtype)
        weights, ids = fused.route(x, weight, bias, 3, 1e-12)
        expected, expected_ids = REFERENCE.route(x, weight, bias, 3, 1e-12)
        assert torch.equal(ids, expected_ids)
        same(weights, expected)


def test_of_equal_experts_the_first_are_chosen_and_what_is_no_number_ends(fused):
    _, ids = fused.route(torch.ones(1, 16), torch.zeros(6, 16), torch.zeros(6), 3, 1e-12)
    assert ids.tolist() == [[0, 1, 2]]
    _, ids = fused.route(torch.full((1, 16), float("nan")), torch.ones(6, 16), torch.zeros(6), 3, 1e-12)
    assert sorted(ids[0].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("form", ["4 bits", "panels", "plain"])
@pytest.mark.parametrize("beside", [True, False])
def test_a_router_and_its_experts_in_one_call_are_both_in_two(fused, noise, beside, form):
    def formed(matrix):
        if form == "4 bits":
            return quantize(matrix, 4)
        matrix = matrix.bfloat16()
        return panels.pack(matrix) if form == "panels" else matrix

    def stack(*shape):
        matrices = noise(*shape) / shape[-1] ** 0.5
        return [formed(matrix) for matrix in matrices] if form == "panels" else formed(matrices)

    router = (noise(10, 128), 0.1 * noise(10), 3, 1e-12)
    weights = stack(10, 128, 128), stack(10, 128, 64)
    shared = (formed(noise(256, 128)), formed(noise(128, 128))) if beside else None
    for tokens in (0, 1, 2, 5, 33):
        x = noise(tokens, 128, dtype=torch.bfloat16)
        two = REFERENCE.experts(x, *fused.route(x, *router), *weights, shared).float()
        one = fused.moe(x, *router, *weights, shared).float()
        assert float((one - two).norm()) <= 0.02 * float(two.norm())


def test_a_router_of_other_experts_is_refused(fused, noise):
    weights = quantize(noise(4, 128, 128), 4), quantize(noise(4, 128, 64), 4)
    with pytest.raises(RuntimeError, match="the router knows these experts"):
        fused.moe(noise(1, 128), noise(5, 128), noise(5), 3, 1e-12, *weights, None)


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 12])
def test_attending_in_one_call_writes_and_reads_as_two_do(fused, noise, head_dim, cache):
    layout = laid_out([(1, 33), (7, 40)], 8)
    layout = replace(
        layout,
        slots=torch.cat([layout.block_tables[0, 4:5] * 8, layout.block_tables[1, 4] * 8 + 1 + torch.arange(7)]).long(),
    )
    qkv, kept = noise(8, (4 + 2 * 2) * head_dim), filled(noise, cache, 64, 8, 2, head_dim)
    rotary, copies = noise(8, head_dim // 2, 2), tuple(each.clone() for each in kept)
    q = fused.rope_and_write(qkv, rotary, *copies, layout.slots, 4)
    expected = fused.attention(q, *copies, layout)
    assert torch.equal(fused.attend(qkv, rotary, *kept, layout, 4), expected)
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 12])
def test_rope_and_write(fused, noise, head_dim, cache, dtype):
    qkv, slots = noise(5, (4 + 2 * 2) * head_dim, dtype=dtype), torch.tensor([3, 17, 0, 8, 31])
    frequencies = 1.0 / 500000.0 ** (torch.arange(0, head_dim, 2) / head_dim)
    rotary = REFERENCE.rotary(torch.tensor([0, 1, 77, 4096, 131071]), frequencies)
    ours, theirs = (REFERENCE.empty_cache(4, 8, 2, head_dim, cache, torch.device("cpu")) for _ in range(2))
    same(fused.rope_and_write(qkv, rotary, *ours, slots, 4), REFERENCE.rope_and_write(qkv, rotary, *theirs, slots, 4))
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = kv_format.numbers(mine), kv_format.numbers(other)
        # one unit of 8 bits, or of bfloat16, where the last bit of a float decides
        assert bool(
            ((mine - other).abs() <= 1e-5 + other.abs().amax() / (120 if cache != torch.float32 else 1e5)).all()
        )


def laid_out(spans, block_size, num_blocks=64):
    """(query_len, context_len) pairs in a cache whose blocks are handed out in no order."""
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    tables = torch.zeros(len(spans), num_blocks, dtype=torch.int32)
    starts = [0]
    for r, (count, context) in enumerate(spans):
        blocks = [order.pop() for _ in range(-(-context // block_size))]
        tables[r, : len(blocks)] = torch.tensor(blocks)
        starts.append(starts[-1] + count)
    none = torch.zeros(starts[-1], dtype=torch.int64)
    return Layout(
        positions=none,
        slots=none,
        block_tables=tables,
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([context for _, context in spans], dtype=torch.int32),
        spans=tuple(Span(start, *span) for start, span in zip(starts, spans, strict=False)),
        block_size=block_size,
    )


def filled(noise, cache, num_blocks, block_size, kv_heads, head_dim):
    made = REFERENCE.empty_cache(num_blocks, block_size, kv_heads, head_dim, cache, torch.device("cpu"))
    for each in made:
        each.copy_(kv_format.stored(noise(num_blocks, block_size, kv_heads, head_dim), each))
    return made


SPANS = [[(1, 1)], [(1, 50)], [(9, 9)], [(7, 40)], [(2, 3), (1, 33), (12, 12), (1, 1), (30, 70), (1, 64)]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 2, 16), (5, 1, 24), (3, 3, 8), (16, 2, 32), (4, 2, 12)]
)
def test_attention(fused, noise, heads, kv_heads, head_dim, cache, dtype):
    for spans in SPANS:
        layout, kept = laid_out(spans, 4), filled(noise, cache, 64, 4, kv_heads, head_dim)
        q = noise(sum(count for count, _ in spans), heads, head_dim, dtype=dtype)
        same(fused.attention(q, *kept, layout), REFERENCE.attention(q, *kept, layout))


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_attention_over_many_parts(fused, noise, cache):
    kept = filled(noise, cache, 64, 32, 2, 16)
    layout, q = laid_out([(1, 2000)], 32), noise(1, 10, 16)
    same(fused.attention(q, *kept, layout), REFERENCE.attention(q, *kept, layout))


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_attention_at_the_end_of_a_full_context(fused, noise, cache):
    kept = filled(noise, cache, 4096, 64, 1, 8)
    layout, q = laid_out([(50, 131_072), (1, 131_072)], 64, num_blocks=4096), noise(51, 2, 8)
    same(fused.attention(q, *kept, layout), REFERENCE.attention(q, *kept, layout))


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_attention_of_a_row_is_the_same_alone_as_in_a_long_prompt(fused, noise, cache):
    kept, q = filled(noise, cache, 64, 32, 2, 16), noise(30, 10, 16)
    together = fused.attention(q, *kept, laid_out([(30, 1040)], 32))
    for i in range(30):  # their contexts are on both sides of where a part ends, 1024
        assert torch.equal(fused.attention(q[i : i + 1], *kept, laid_out([(1, 1011 + i)], 32)), together[i : i + 1])


def test_large_scores_do_not_overflow(fused, noise):
    kept, q = filled(noise, torch.float32, 64, 4, 1, 8), 1e4 * noise(3, 1, 8)
    layout = laid_out([(3, 90)], 4)
    y = fused.attention(q, *kept, layout)
    assert bool(y.isfinite().all())
    same(y, REFERENCE.attention(q, *kept, layout))


def test_a_block_outside_of_the_cache_is_refused(fused, noise):
    kept, layout = filled(noise, torch.float32, 4, 4, 1, 8), laid_out([(1, 9)], 4, num_blocks=4)
    layout.block_tables[0, 1] = 4
    with pytest.raises(RuntimeError, match="block 4 is outside"):
        fused.attention(noise(1, 1, 8), *kept, layout)


CONFIG = ModelConfig.from_dict(
    {
        "model_type": "ernie4_5_moe",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "tie_word_embeddings": True,
    }
)


def model_of(fused, noise):
    model = Ernie(CONFIG, fused, torch.bfloat16)
    for parameter in model.parameters():
        parameter.copy_(noise(*parameter.shape) / parameter.shape[-1] ** 0.5)
    return model


@pytest.fixture(params=["4 bits", "bfloat16"])
def model(request, fused, noise, monkeypatch):
    made = model_of(fused, noise)
    if request.param == "4 bits":
        for name in matrices(made):
            set_matrix(made, name, quantize(made.get_parameter(name).detach(), 4))
        set_matrix(made, "embed_tokens.weight", quantize(made.embed_tokens.weight, 8))
    else:
        monkeypatch.setattr(cpu, "_HAS_ONEDNN_BF16", False)
        pack(made)
    return made


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.int8], ids=str)
def test_a_models_logits_do_not_depend_on_the_schedule(model, fused, cache):
    texts = [torch.randint(0, 96, (40,)) for _ in range(3)]

    def run(*steps):
        """The logits of each text's tokens; a step is how many of each come next. A negative count starts it again."""
        kept = [fused.empty_cache(24, 8, 2, 16, cache, torch.device("cpu")) for _ in range(3)]
        done, logits = [0] * 3, [torch.zeros(40, 96, dtype=torch.bfloat16) for _ in range(3)]
        for step in steps:
            done = [0 if count < 0 else start for start, count in zip(done, step, strict=True)]
            rows = [(text, done[text], done[text] + abs(count)) for text, count in enumerate(step) if count]
            layout = laid_out([(40, 40)] * 3, 8, 24)
            tables = layout.block_tables[[text for text, _, _ in rows]]
            positions = torch.cat([torch.arange(start, stop) for _, start, stop in rows])
            slots = torch.cat(
                [
                    layout.block_tables[text].long()[torch.arange(start, stop) // 8] * 8 + torch.arange(start, stop) % 8
                    for text, start, stop in rows
                ]
            )
            starts = torch.tensor([0, *(stop - start for _, start, stop in rows)]).cumsum(0).int()
            contexts = torch.tensor([stop for _, _, stop in rows]).int()
            layout = Layout(positions, slots, tables, starts, contexts, (), 8)
            ids = torch.cat([texts[text][start:stop] for text, start, stop in rows])
            made = model(ids, layout, kept, torch.arange(len(ids)))
            for (text, start, stop), part in zip(rows, made.split(starts.diff().tolist()), strict=True):
                logits[text][start:stop] = part
                done[text] = stop
        return torch.cat(logits)

    with torch.inference_mode():
        alone = run((40, 0, 0), (0, 40, 0), (0, 0, 40))
        assert torch.equal(run((40, 40, 40)), alone)  # in a batch
        assert torch.equal(run(*[(1, 1, 1)] * 40), alone)  # token by token
        assert torch.equal(run((17, 40, 0), (1, 0, 3), (22, 0, 37)), alone)  # a prompt in pieces beside others
        assert torch.equal(run((30, 0, 40), (-35, 40, 0), (5, 0, 0)), alone)  # preempted and computed again
        torch.set_num_threads(2)
        try:
            assert torch.equal(run((40, 40, 40)), alone)
        finally:
            torch.set_num_threads(1)
