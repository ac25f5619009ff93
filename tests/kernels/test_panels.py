"""bfloat16 in panels: the order is what its definition says, and no sum depends on what is computed beside it."""

import pytest
import torch

from ernie_serve.kernels import cpu, fused
from ernie_serve.kernels.cpu import CpuKernels, multiplies_in_panels
from ernie_serve.kernels.fused import FusedCpuKernels, cpu_kernels_for
from ernie_serve.kernels.native import is_compiled
from ernie_serve.kernels.panels import Panels, pack
from ernie_serve.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (16, 8), (37, 51), (72, 320), (160, 33)]  # rows that are no whole panels, columns of every kind
TOKENS = [1, 2, 3, 5, 6, 7, 17, 64]


@pytest.fixture(params=["native", "portable"])
def kernels(request, monkeypatch):
    """Kernels that use these operators, on a processor that has no instructions for bfloat16."""
    monkeypatch.setattr(cpu, "_HAS_ONEDNN_BF16", False)
    return FusedCpuKernels(request.getfixturevalue(request.param))


@pytest.fixture
def noise():
    chance = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.bfloat16: torch.randn(shape, generator=chance).to(dtype)


@pytest.fixture
def poison(monkeypatch):
    """Memory that an operator is given is full of what is no number, and what it leaves shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def same(actual, expected):
    loose = expected.dtype != torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-2 if loose else 1e-4, atol=1e-2 if loose else 1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_and_back_changes_no_number(noise, shape):
    weight = noise(*shape)
    packed = pack(weight)
    assert packed.shape == shape
    assert packed.data.shape == (-(-shape[0] // 16), shape[1], 8, 2)
    assert torch.equal(packed.numbers(), weight)
    ids = torch.randint(0, shape[0], (9,))
    assert torch.equal(packed.lookup(ids), weight[ids])


def test_a_column_of_a_panel_is_eight_pairs_of_rows_eight_apart():
    rows = torch.arange(32.0)[:, None].bfloat16().expand(32, 3)
    assert pack(rows).data[1, 2].tolist() == [[16.0 + i, 24.0 + i] for i in range(8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_operator_packs_as_the_definition_does(kernels, noise, shape):
    weight = noise(*shape)
    made = kernels.pack(weight)
    assert isinstance(made, Panels)
    assert made.rows == shape[0]
    assert torch.equal(made.data, pack(weight).data)
    stack = kernels.pack(weight.expand(3, *shape))
    assert [each.rows for each in stack] == [shape[0]] * 3
    assert all(torch.equal(each.data, made.data) for each in stack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(kernels, noise, poison, shape, dtype):
    weight = pack(noise(*shape) / shape[1] ** 0.5)
    for tokens in (0, *TOKENS):
        x = noise(tokens, shape[1], dtype=dtype)
        same(kernels.linear(x, weight), REFERENCE.linear(x, weight))


@pytest.mark.parametrize("shape", [*SHAPES, (300, 2560)], ids=str)
def test_a_row_is_computed_alone_as_in_company(kernels, noise, shape):
    weight, x = pack(noise(*shape)), noise(64, shape[1])
    alone = torch.cat([kernels.linear(row[None], weight) for row in x])
    for tokens in TOKENS:
        assert torch.equal(kernels.linear(x[:tokens], weight), alone[:tokens])


def test_sums_are_of_float32(kernels):
    x, weight = torch.ones(1, 4096, dtype=torch.bfloat16), torch.ones(16, 4096, dtype=torch.bfloat16)
    weight[:, 0] = 512.0
    assert kernels.linear(x, pack(weight)).tolist() == [[4608.0] * 16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embedding_gives_the_rows(kernels, noise, poison, shape, dtype):
    weight = noise(*shape)
    ids = torch.randint(0, shape[0], (9,))
    assert torch.equal(kernels.embedding(ids, pack(weight), dtype), weight[ids].to(dtype))
    with pytest.raises(IndexError, match=f"{shape[0]} is outside of the {shape[0]} rows"):
        kernels.embedding(torch.tensor([shape[0]]), pack(weight), dtype)


def experts_in_panels(noise, E=8, N=128, width=96, shared_width=160):
    def stack(*shape):
        return [pack(noise(*shape) / shape[1] ** 0.5) for _ in range(E)]

    shared = pack(noise(2 * shared_width, N) / 8), pack(noise(N, shared_width) / 8)
    return stack(2 * width, N), stack(N, width), shared


def router_of(noise, E=8, N=128, top_k=3):
    """A router that never chooses the last two experts, where there are more."""
    bias = torch.zeros(E)
    bias[2:][-2:] = -2.0
    return noise(E, N, dtype=torch.float32) / N**0.5, bias, top_k, 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(kernels, noise, poison, dtype):
    gate_up, down, shared = experts_in_panels(noise)
    router = router_of(noise)
    assert kernels.moe(noise(0, 128, dtype=dtype), *router, gate_up, down, shared).shape == (0, 128)
    for tokens in (1, 2, 3, 9, 33):
        x = noise(tokens, 128, dtype=dtype)
        weights, ids = kernels.route(x, *router)
        assert ids.max() < 6
        for beside in (None, shared):
            expected = REFERENCE.experts(x.float(), weights.float(), ids, gate_up, down, beside)
            y = kernels.moe(x, *router, gate_up, down, beside)
            assert y.dtype == dtype
            bound = (5e-3 if dtype == torch.bfloat16 else 1e-5) * float(expected.norm())
            assert float((y.float() - expected).norm()) <= bound


def test_the_hidden_row_is_rounded_as_the_plain_path_rounds_it(kernels, noise):
    gate_up, down, _ = experts_in_panels(noise, E=1)
    x = noise(1, 128)
    gate, up = (x.float() @ gate_up[0].numbers().float().T).chunk(2, dim=-1)
    hidden = (torch.nn.functional.silu(gate) * up).bfloat16()
    y = kernels.moe(x, *router_of(noise, E=1, top_k=1), gate_up, down, None)
    same(y, REFERENCE.linear(hidden, down[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_goes_through_the_experts_alone_as_in_company(kernels, noise, dtype):
    gate_up, down, shared = experts_in_panels(noise)
    x, router = noise(64, 128, dtype=dtype), router_of(noise)

    def run(some):
        return kernels.moe(x[some], *router, gate_up, down, shared)

    alone = torch.cat([run(slice(t, t + 1)) for t in range(64)])
    for tokens in TOKENS:
        assert torch.equal(run(slice(tokens)), alone[:tokens])


def test_tokens_beyond_one_pass_are_computed_like_the_first(kernels, noise):
    gate_up, down, _ = experts_in_panels(noise, E=2, N=16, width=32)
    x, router = noise(1100, 16), router_of(noise, E=2, N=16, top_k=1)
    whole = kernels.moe(x, *router, gate_up, down, None)
    assert torch.equal(whole[1000:], kernels.moe(x[1000:], *router, gate_up, down, None))


def test_the_number_of_threads_changes_no_number(kernels, noise):
    gate_up, down, shared = experts_in_panels(noise)
    x, router = noise(9, 128), router_of(noise)
    weight = pack(noise(300, 128))

    def run():
        return kernels.linear(x, weight), kernels.moe(x, *router, gate_up, down, shared)

    one = run()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            assert all(torch.equal(ours, first) for ours, first in zip(run(), one, strict=True))
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize(("width", "size"), [(24, 128), (96, 24)])
def test_experts_of_widths_that_are_no_whole_panels_go_one_after_the_other(kernels, noise, width, size):
    gate_up, down, _ = experts_in_panels(noise, N=size, width=width)
    x, router = noise(9, size), router_of(noise, N=size)
    same(kernels.moe(x, *router, gate_up, down, None), REFERENCE.moe(x, *router, gate_up, down, None))


def test_what_is_no_number_stays_in_its_row(kernels, noise):
    weight = pack(noise(40, 51))
    for broken in (float("nan"), float("inf")):
        x = noise(7, 51)
        x[4, 50] = broken
        y = kernels.linear(x, weight)
        assert y.isfinite().all(-1).tolist() == [True] * 4 + [False] + [True] * 2
        assert not y[4].isfinite().any()


def test_shapes_that_do_not_fit_are_refused(native, noise):
    data = pack(noise(40, 64)).data
    with pytest.raises(RuntimeError, match="64 columns"):
        native.panel_linear(noise(2, 128), data, 40)
    with pytest.raises(RuntimeError, match="rows do not fit"):
        native.panel_linear(noise(2, 64), data, 49)
    with pytest.raises(RuntimeError, match=r"\[R / 16, C, 8, 2\]"):
        native.panel_linear(noise(2, 64), data.float(), 40)
    with pytest.raises(RuntimeError, match="of a bfloat16 matrix"):
        native.panels(torch.ones(16, 8))
    gate_up, down, _ = experts_in_panels(noise)
    stacks = [each.data for each in gate_up], [each.data for each in down]
    x, router = noise(1, 128), router_of(noise)
    with pytest.raises(RuntimeError, match="the router knows these experts"):
        native.panel_moe(x, *router_of(noise, E=7), *stacks, None, None)
    with pytest.raises(RuntimeError, match="one shape"):
        native.panel_moe(x, *router, [stacks[0][0], data], stacks[1], None, None)
    narrow = [pack(noise(48, 128)).data], [pack(noise(128, 24)).data]
    with pytest.raises(RuntimeError, match="a multiple of 32, not 24"):
        native.panel_moe(x, *router, *narrow, None, None)


def test_a_processor_that_multiplies_bfloat16_itself_is_left_to_torch(noise, monkeypatch):
    monkeypatch.setattr(cpu, "_HAS_ONEDNN_BF16", True)
    assert not multiplies_in_panels(torch.bfloat16)
    assert type(cpu_kernels_for(torch.bfloat16)) is CpuKernels


def test_nothing_is_compiled_for_float32(monkeypatch):
    monkeypatch.setattr(fused, "operators", lambda: pytest.fail("not needed"))
    assert type(cpu_kernels_for(torch.float32)) is CpuKernels
    assert not CpuKernels().packs(torch.float32)


def test_a_small_model_alone_is_not_worth_compiling_for(monkeypatch):
    monkeypatch.setattr(cpu, "_HAS_ONEDNN_BF16", False)
    monkeypatch.setattr(fused, "operators", lambda: pytest.fail("not needed"))
    monkeypatch.setattr(fused, "is_compiled", lambda: False)
    small = cpu_kernels_for(torch.bfloat16, num_bytes=10_000_000)
    assert type(small) is CpuKernels
    assert not small.packs(torch.bfloat16)


def test_what_is_compiled_already_serves_a_small_model_too(native, monkeypatch):
    monkeypatch.setattr(cpu, "_HAS_ONEDNN_BF16", False)
    assert is_compiled()
    assert type(cpu_kernels_for(torch.bfloat16, num_bytes=10_000_000)) is FusedCpuKernels


def test_without_a_compiler_matrices_stay_as_they_are(noise, monkeypatch):
    monkeypatch.setattr(cpu, "_HAS_ONEDNN_BF16", False)
    weight, x = noise(37, 51), noise(5, 51)
    assert CpuKernels().pack(weight) is weight
    same(CpuKernels().linear(x, pack(weight)), REFERENCE.linear(x, weight))
