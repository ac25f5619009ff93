"""The operators of `cpu.cpp` on packed matrices, as they are served and without what only some processors have."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ernie_serve.kernels import cpu, native, packed
from ernie_serve.kernels.cpu import CpuKernels
from ernie_serve.kernels.fused import FusedCpuKernels
from ernie_serve.kernels.packed import Packed, quantize
from ernie_serve.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["native", "portable"])
def ops(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def noise():
    chance = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=chance).to(dtype)


def parts(matrix: Packed | None):
    return (None, None, 0) if matrix is None else (matrix.data, matrix.row_scales, matrix.bits)


def linear(ops, x, weight):
    return ops.linear(x, *parts(weight), weight.rows)


def moe(ops, x, router, gate_up, down, shared):
    return ops.moe(x, *router, *parts(gate_up), *parts(down), *(p for m in shared or (None, None) for p in parts(m)))


def router_of(noise, E=8, N=128, top_k=3):
    """A router that never chooses the last two experts."""
    bias = torch.zeros(E)
    bias[-2:] = -2.0
    return noise(E, N) / N**0.5, bias, top_k, 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(8, 64), (13, 128), (72, 320)], ids=str)
def test_linear_is_off_by_the_activations_half_steps_at_most(ops, noise, shape, bits, dtype):
    weight = quantize(noise(*shape), bits)
    numbers = weight.dequantized()
    assert linear(ops, noise(0, shape[1], dtype=dtype), weight).shape == (0, shape[0])
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 33):
        x = noise(tokens, shape[1], dtype=dtype)
        expected = x.float() @ numbers.T
        groups, sizes = x.float().view(tokens, -1, 32), numbers.abs().view(shape[0], -1, 32)
        half_steps = groups.abs().amax(-1) / 254
        bound = half_steps @ sizes.sum(-1).T + 1e-5 * (x.float().abs() @ numbers.abs().T)
        bound = bound + expected.abs() * (2**-8 if dtype == torch.bfloat16 else 0)
        assert bool(((linear(ops, x, weight).float() - expected).abs() <= bound).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_activations_and_weights_do_not_overflow(ops, bits):
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    codes, scales = torch.full((8, 4), 127, dtype=torch.int8), torch.ones(8)
    for q in (low, high):
        weight = packed.pack(torch.full((8, 128), q, dtype=torch.int8), codes, scales, bits)
        for x in (1.0, -1.0):
            y = linear(ops, torch.full((3, 128), x), weight)
            torch.testing.assert_close(y, torch.full((3, 8), 128.0 * 127 * q * x))


def packed_experts(noise, bits, shared_bits, E=8, N=128, width=192):
    shared = quantize(noise(2 * 256, N) / 8, shared_bits), quantize(noise(N, 256) / 8, shared_bits)
    return quantize(noise(E, 2 * width, N) / 8, bits), quantize(noise(E, N, width) / 8, bits), shared


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "shared_bits"), [(4, 4), (4, 8), (8, 4)])
def test_experts_are_within_two_hundredths(ops, noise, bits, shared_bits, dtype):
    gate_up, down, shared = packed_experts(noise, bits, shared_bits)
    router = router_of(noise)
    for tokens in (1, 2, 3, 9, 33):
        x = noise(tokens, 128, dtype=dtype)
        weights, ids = ops.route(x, *router)
        assert ids.max() < 6
        for beside in (None, shared):
            expected = REFERENCE.experts(x.float(), weights.float(), ids, gate_up, down, beside)
            y = moe(ops, x, router, gate_up, down, beside).float()
            assert float((y - expected).norm()) <= 0.02 * float(expected.norm())


def test_no_tokens_are_no_tokens(ops, noise):
    gate_up, down, shared = packed_experts(noise, 4, 4)
    assert moe(ops, noise(0, 128), router_of(noise), gate_up, down, shared).shape == (0, 128)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_computed_alone_as_in_company(ops, noise, dtype):
    gate_up, down, shared = packed_experts(noise, 4, 8)
    x, router = noise(40, 128, dtype=dtype), router_of(noise)
    together = moe(ops, x, router, gate_up, down, shared)
    alone = [moe(ops, x[t : t + 1], router, gate_up, down, shared) for t in range(40)]
    assert torch.equal(torch.cat(alone), together)
    for weight in (gate_up[0], shared[0]):
        assert torch.equal(torch.cat([linear(ops, row[None], weight) for row in x]), linear(ops, x, weight))


def test_tokens_beyond_one_pass_are_computed_like_the_first(native, noise):
    gate_up, down, _ = packed_experts(noise, 4, 4, E=4, N=64, width=64)
    shared = quantize(noise(128, 64), 4), quantize(noise(64, 64), 4)
    x, router = noise(1100, 64), router_of(noise, E=4, N=64, top_k=1)
    whole = moe(native, x, router, gate_up, down, shared)
    assert torch.equal(whole[1000:], moe(native, x[1000:], router, gate_up, down, shared))


def test_the_number_of_threads_changes_no_number(native, noise):
    gate_up, down, shared = packed_experts(noise, 4, 8)
    x, router = noise(9, 128), router_of(noise)
    one = moe(native, x, router, gate_up, down, shared)
    torch.set_num_threads(3)
    try:
        assert torch.equal(moe(native, x, router, gate_up, down, shared), one)
    finally:
        torch.set_num_threads(1)


def test_every_processor_computes_the_same(native, portable, noise):
    gate_up, down, shared = packed_experts(noise, 4, 8)
    x, router = noise(9, 128), router_of(noise)
    for weight in (gate_up[1], shared[1]):
        wide = noise(9, weight.columns)
        torch.testing.assert_close(linear(native, wide, weight), linear(portable, wide, weight), rtol=1e-5, atol=1e-5)
    # rounding to 8 bits may fall to the other side here and there
    ours, theirs = (moe(each, x, router, gate_up, down, shared) for each in (native, portable))
    assert float((ours - theirs).norm()) <= 1e-3 * float(theirs.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_makes_the_matrix_of_the_definition(ops, noise, bits, search, dtype):
    weight = noise(45, 320, dtype=dtype)
    weight[7] = 0
    expected, made = quantize(weight, bits, search), packed.empty(45, 320, bits)
    ops.quantize(weight, bits, search, made.data, made.row_scales)
    torch.testing.assert_close(made.row_scales, expected.row_scales, rtol=1e-6, atol=0)
    differing = (made.data != expected.data).float().mean()  # where two roundings are as good
    assert float(differing) < 0.002
    errors = [float((each.dequantized() - weight.float()).norm()) for each in (made, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_gives_the_rows(ops, noise, bits, dtype):
    weight, ids = quantize(noise(45, 128), bits), torch.tensor([0, 44, 7, 8, 7])
    y = ops.embedding(ids, *parts(weight), weight.rows, dtype)
    torch.testing.assert_close(
        y, REFERENCE.embedding(ids, weight, dtype), rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=0
    )
    with pytest.raises(IndexError, match="45 is outside of the 45 rows"):
        ops.embedding(torch.tensor([45]), *parts(weight), weight.rows, dtype)


def test_what_is_no_number_is_not_lost(ops, noise):
    weight = quantize(noise(8, 64), 4)
    for broken in (float("nan"), float("inf")):
        x = noise(2, 64)
        x[1, 50] = broken
        y = linear(ops, x, weight)
        assert bool(y[0].isfinite().all())
        assert not y[1].isfinite().any()


def test_shapes_that_do_not_fit_are_refused(native, noise):
    weight = quantize(noise(8, 64), 4)
    with pytest.raises(RuntimeError, match="64 columns"):
        linear(native, noise(2, 128), weight)
    with pytest.raises(RuntimeError, match="bits"):
        native.linear(noise(2, 64), weight.data, weight.row_scales, 8, 8)
    gate_up, *_ = packed_experts(noise, 4, 4)
    with pytest.raises(RuntimeError, match=r"gate_up is \[E, 2I, N\]"):
        moe(native, noise(1, 128), router_of(noise), gate_up, quantize(noise(8, 128, 128), 4), None)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_there_is_one_openmp_runtime(native):
    program = """
from pathlib import Path
from ernie_serve.kernels.native import operators
assert operators() is not None
maps = Path("/proc/self/maps").read_text().splitlines()
print(len({line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}))
"""  # a process of its own: other tests import packages that bring one along
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert int(told) <= 1


def test_the_kernels_use_the_operators(native, noise):
    kernels, weight, x = FusedCpuKernels(native), quantize(noise(13, 64), 4), noise(5, 64)
    assert torch.equal(kernels.linear(x, weight), linear(native, x, weight))
    assert torch.equal(kernels.embedding(torch.tensor([12, 3]), weight, torch.float32), weight.dequantized()[[12, 3]])
    made, half = packed.empty(13, 64, 8), noise(13, 64).half()
    native.quantize(half.float(), 8, True, made.data, made.row_scales)
    assert torch.equal(kernels.quantize(half, 8).data, made.data)


def test_without_a_compiler_plain_torch_serves_packed_matrices(noise, monkeypatch):
    monkeypatch.setattr(cpu, "_SLICE", 64 * 16)
    kernels, weight, x = CpuKernels(), quantize(noise(45, 64), 4), noise(5, 64)
    torch.testing.assert_close(kernels.linear(x, weight), REFERENCE.linear(x, weight))
    gate_up, down, shared = packed_experts(noise, 4, 8)
    x, weights, ids = noise(9, 128), torch.rand(9, 3), torch.randint(0, 8, (9, 3))
    expected = REFERENCE.experts(x, weights, ids, gate_up, down, shared)
    torch.testing.assert_close(kernels.experts(x, weights, ids, gate_up, down, shared), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(kernels.embedding(ids[0], weight, torch.float32), weight.dequantized()[ids[0]])
    assert torch.equal(kernels.quantize(weight.dequantized(), 4).data, quantize(weight.dequantized(), 4).data)


def test_a_compiler_that_is_not_there_is_told_before_torch_looks_for_it(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with caplog.at_level(logging.INFO), pytest.raises(OSError, match=r"^there is no no-such-compiler on PATH$"):
        native.load(extra_flags=("-DNOTHING",))
    assert caplog.text == ""


def test_what_is_missing_to_compile_is_said_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr(native, "load", lambda **_: (_ for _ in ()).throw(RuntimeError("Ninja is required\nmore")))
    native.operators.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.operators() is None
        assert "apt install g++ ninja-build" in caplog.text
        assert "(Ninja is required)" in caplog.text
    finally:
        native.operators.cache_clear()
