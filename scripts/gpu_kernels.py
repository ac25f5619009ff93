"""Each kernel of a GPU beside the reference, on random numbers, its outputs poisoned.

Knows what each takes and which sizes go which way. Knows no time.
"""

import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_machine import PAGE, Machine, Report
from torch import Tensor

from ernie_serve.kernels import prompt_attention
from ernie_serve.kernels.cuda import CudaKernels
from ernie_serve.kernels.fused_cuda import FusedCudaKernels
from ernie_serve.kernels.layout import Layout, Span
from ernie_serve.kernels.quantized import Quantized, quantize
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.messages import PlanRow, SamplingParams
from ernie_serve.model.config import ModelConfig
from ernie_serve.worker.sampler import Sampler, uniform


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is to be written is full of not-a-number, so that a gap in an output shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def spoiled(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan") if tensor.dtype.is_floating_point else 99)

    torch.empty = lambda *args, **options: spoiled(empty(*args, **options))
    torch.empty_like = lambda *args, **options: spoiled(empty_like(*args, **options))
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like


GROUPS = ("plain", "int8", "fp8", "int4", "attention", "others")
"""What kernels are checked together: the experts of each format, attention with what writes its cache, and the rest."""


def check_all_kernels(report: Report, machine: Machine) -> None:
    """Every group in a process of its own, all at once: most of the time is the compiler's."""
    if machine.dry:
        for group in GROUPS:
            check_kernels(report, machine, group)
        return
    with tempfile.TemporaryDirectory() as folder:
        groups = [group for group in GROUPS if group != "fp8" or machine.reads_fp8]
        files = [Path(folder) / f"{group}.json" for group in groups]
        run = [sys.executable, str(Path(__file__).with_name("gpu_check.py")), "--kernels"]
        started = [subprocess.Popen([*run, g, "--out", str(f)]) for g, f in zip(groups, files, strict=True)]
        for group, file, process in zip(groups, files, started, strict=True):
            process.wait()
            found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"kernels": [], "failed": []}
            report.values["kernels"] += found["kernels"]
            report.values["failed"] += found["failed"]
            if process.returncode and not found["failed"]:
                report.values["failed"].append(f"kernels {group}: ended with {process.returncode}")


def check_kernels(report: Report, machine: Machine, group: str) -> None:
    """One group at the model's own shapes and at several numbers of tokens."""
    c = ModelConfig.from_dict(machine.values, source="gpu_check")
    tolerance = 1e-4 if machine.dry else 0.03
    if group == "attention":
        check_attention(report, machine, c, tolerance)
    elif group == "others":
        check_others(report, machine, c, tolerance)
        check_sampling(report, machine)
    else:
        check_experts(report, machine, c, None if group == "plain" else group, tolerance)


def normal(machine: Machine, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=machine.device) * scale).to(machine.dtype)


def check_experts(report: Report, machine: Machine, c: ModelConfig, format: Any, tolerance: float) -> None:
    """The experts of one format, at each way that a number of tokens goes; some tokens route nowhere."""
    reference, kernels = ReferenceKernels(), CudaKernels()
    N, E, A, width = c.hidden_size, c.moe_num_experts, c.moe_k, c.moe_intermediate_size
    wide = c.shared_intermediate_size
    weights = [normal(machine, E, 2 * width, N, scale=N**-0.5), normal(machine, E, N, width, scale=width**-0.5)]
    weights += [normal(machine, 2 * wide, N, scale=N**-0.5), normal(machine, N, wide, scale=wide**-0.5)]
    gate_up, down, *shared = [rounded(w, format) if format else w for w in weights]
    for T in (1, 3) if machine.dry else (1, 4, 16, 17, 64, 200, 600, 1100, 1500):
        x = normal(machine, T, N)
        chances, ids = reference.route(
            x, torch.randn(E, N, device=machine.device), torch.zeros(E, device=machine.device), A, 1e-12
        )
        ids = ids.int()
        ids[T - T // 4 :] = -1  # as padded rows
        if T == 1:  # of which that one has no place for others: one slot routes nowhere
            ids[0, -1] = -1
        with poisoned():
            got = kernels.experts(x, chances, ids, gate_up, down, tuple(shared))
        got = got.float().sum(1) if got.dim() == 3 else got
        chances = chances.masked_fill(ids < 0, 0)
        want = reference.experts(x, chances, ids.clamp(min=0), gate_up, down, tuple(shared))
        report.compared(f"experts {format or 'plain'} T={T}", got, want, tolerance)
    check_one_row(report, machine, c, format, tolerance, (gate_up, down, tuple(shared)))


def check_one_row(
    report: Report, machine: Machine, c: ModelConfig, format: Any, tolerance: float, matrices: tuple[Any, Any, Any]
) -> None:
    """The kernels of a single stream, which norm, turn, write, choose and add on their way, beside the reference."""
    reference, kernels = ReferenceKernels(), FusedCudaKernels()
    N, E, H, K, D = c.hidden_size, c.moe_num_experts, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    stream, norm, heads = normal(machine, 1, N), normal(machine, N), normal(machine, 1, H * D)
    router_weight = torch.randn(E, N, device=machine.device) * N**-0.5
    args = (norm, 1e-5, router_weight, torch.randn(E, device=machine.device) * 1e-3, c.moe_k, 1e-12, *matrices)
    for before in (None, normal(machine, 1, N)):
        with poisoned():
            got, pending = kernels.norm_moe(stream, before, *args)
        if pending is not None:
            got = got.float() + pending.float().sum(1)
        want, pending = reference.norm_moe(stream.clone(), before, *args)
        name = f"one row of experts {format or 'plain'}{'' if before is None else ', something pending'}"
        report.compared(name, got, want + pending, tolerance)
    kept = "int8" if format == "int4" else format
    qkv, o = normal(machine, (H + 2 * K) * D, N, scale=N**-0.5), normal(machine, N, H * D, scale=(H * D) ** -0.5)
    qkv, o = ((rounded(each, kept) if kept else each) for each in (qkv, o))
    with poisoned():
        got, _ = kernels.add_linear(stream, heads, o)
    report.compared(f"one row added, {kept or 'plain'}", got, stream + reference.linear(heads, o), tolerance)
    for before in (None, normal(machine, 1, N)):
        with poisoned():
            _, got = kernels.norm_linear(stream, before, norm, 1e-5, qkv)
        _, want = reference.norm_linear(stream.clone(), before, norm, 1e-5, qkv)
        report.compared(
            f"one row normed, {kept or 'plain'}{'' if before is None else ', pending'}", got, want, tolerance
        )
    length = 40
    slots = torch.tensor([length - 1], device=machine.device)
    rotary = reference.rotary(slots, torch.rand(D // 2, device=machine.device))
    table, starts = torch.zeros(1, 1, dtype=torch.int32, device=machine.device), torch.tensor([0, 1], dtype=torch.int32)
    layout = Layout(slots, slots, table, starts, (slots + 1).int(), (Span(0, 1, length),), PAGE)
    for cache_dtype in (machine.dtype, *([torch.float8_e4m3fn] if machine.reads_fp8 else []), torch.int8):
        caches, copies = (reference.empty_cache(1, PAGE, K, D, cache_dtype, machine.device) for _ in range(2))
        with poisoned():
            _, got = kernels.norm_attend(stream, None, norm, 1e-5, qkv, rotary, *copies, layout, H)
        _, want = reference.norm_attend(stream, None, norm, 1e-5, qkv, rotary, *caches, layout, H)
        name = f"one row's attention, {kept or 'plain'}, cache {cache_dtype}"
        report.compared(name, got, want, 0.13 if cache_dtype != machine.dtype else max(tolerance, 0.03))
        for one, other, what in zip(copies, caches, ("keys", "values"), strict=True):
            if cache_dtype == machine.dtype:
                report.compared(f"{name}: {what}", one, other, tolerance)
        nobody = dataclasses.replace(layout, slots=slots - length, context_lens=torch.zeros_like(layout.context_lens))
        before = [cache.view(torch.uint8).clone() for cache in copies]
        with poisoned():
            _, got = kernels.norm_attend(stream, None, norm, 1e-5, qkv, rotary, *copies, nobody, H)
        report.compared(f"{name}, of a padded row", got, torch.zeros_like(got), 0.0)
        for one, other in zip(copies, before, strict=True):
            is_kept = (one.view(torch.uint8) == other).float().mean()
            report.compared(f"{name}: what a padded row leaves", is_kept, torch.ones_like(is_kept), 0.0)


def check_others(report: Report, machine: Machine, c: ModelConfig, tolerance: float) -> None:
    """Norm, router, SwiGLU and products of few rows."""
    reference, kernels = ReferenceKernels(), CudaKernels()
    N, E, A = c.hidden_size, c.moe_num_experts, c.moe_k
    heads = c.head_dim * (c.num_attention_heads + 2 * c.num_key_value_heads)
    for T, outputs in itertools.product((1, 5, 16), (heads, 512 if machine.dry else c.vocab_size)):
        x, matrix = normal(machine, T, N), normal(machine, outputs, N, scale=N**-0.5)
        with poisoned():
            found = kernels.linear(x, matrix)
        report.compared(f"linear T={T} of {outputs}", found, reference.linear(x, matrix), tolerance)
    for T, format in itertools.product((1, 3) if machine.dry else (1, 16, 64, 200, 600), ("int8", "fp8")):
        if format == "int8" or machine.reads_fp8:
            x, matrix = normal(machine, T, N), rounded(normal(machine, heads, N, scale=N**-0.5), format)
            with poisoned():
                found = kernels.linear(x, matrix)
            report.compared(f"linear {format} T={T} of {heads}", found, reference.linear(x, matrix), tolerance)
    weight = torch.randn(E, N, device=machine.device) * N**-0.5
    bias = torch.randn(E, device=machine.device) * 1e-3
    for T in (1, 3) if machine.dry else (1, 4, 16, 17, 64, 200, 600):
        x, scale = normal(machine, T, N), normal(machine, N)
        for delta in (normal(machine, T, N), normal(machine, T, A + 2, N)):
            with poisoned():
                got = kernels.add_rms_norm(x.clone(), delta, scale, 1e-5)
            total = delta if delta.dim() == 2 else delta.float().sum(1).to(x.dtype)
            want = reference.add_rms_norm(x, total, scale, 1e-5)
            for name, one, other in zip(("sum", "norm"), got, want, strict=True):
                report.compared(f"add_rms_norm {name} T={T} of {delta.dim()}", one, other, tolerance)
        with poisoned():
            chances, ids = kernels.route(x, weight, bias, A, 1e-12)
        want_chances, want_ids = reference.route(x, weight, bias, A, 1e-12)
        same = (ids == want_ids).float().mean()
        report.compared(f"route ids T={T}", same, torch.ones((), device=machine.device), 0.01)
        agree = (ids == want_ids).all(-1)
        report.compared(f"route weights T={T}", chances[agree], want_chances[agree], tolerance)
        wide = normal(machine, T, 2 * c.moe_intermediate_size)
        with poisoned():
            one = kernels.swiglu(wide)
        report.compared(f"swiglu T={T}", one, reference.swiglu(wide), tolerance)


def check_sampling(report: Report, machine: Machine) -> None:
    """Tokens beside those of the sampler in plain torch: greedy, by chance, and with limits."""
    V, R = machine.values["vocab_size"], 8 if machine.dry else 64
    logits = (torch.randn(R, V, device=machine.device) * 3).to(machine.dtype)
    kinds = [(0.0, 1.0, 0.0, 0), (1.0, 1.0, 0.0, 0), (0.8, 0.9, 0.0, 0), (1.0, 1.0, 0.05, 0), (0.7, 0.95, 0.0, 50)]
    rows = [
        PlanRow(
            request_id=str(r), token_ids=[7], start=0, block_ids=[0], wants_token=True, prompt_token_ids=[7],
            output_token_ids=[],
            sampling=SamplingParams(max_tokens=9, temperature=t, top_p=p, min_p=m, top_k=k, seed=r),
        )
        for r, (t, p, m, k) in ((r, kinds[r % len(kinds)]) for r in range(R))
    ]  # fmt: skip
    settings = torch.tensor(
        [[uniform(r.sampling.seed, 0), r.sampling.temperature, r.sampling.top_p, r.sampling.min_p] for r in rows],
        dtype=torch.float64, device=machine.device,
    )  # fmt: skip
    top_ks = torch.tensor([r.sampling.top_k for r in rows], dtype=torch.int32, device=machine.device)
    with poisoned():
        got = CudaKernels().sample(logits, settings, top_ks, V)
    want = [each.token_id for each in Sampler(max_requests=R, num_valid_ids=V).sample(logits.cpu().float(), rows)]
    same = (got.cpu() == torch.tensor(want)).float().mean()
    report.compared("sampling", same, torch.ones(()), 0.05)  # a sum may round to the other side of the point


def check_attention(report: Report, machine: Machine, c: ModelConfig, tolerance: float) -> None:
    """The paged kernel in each cache format, and what prompts take; few requests split their contexts, many do not."""
    for lens, page in [([5, 18], 8)] if machine.dry else [([1, 64, 1000, 5000], PAGE), ([300] * 69 + [3], 16)]:
        check_paged_attention(report, machine, c, tolerance, lens, page)
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    if prompt_attention.prefers_cudnn(machine.device):
        for tokens, before in ((8192, 0), (3000, 0), (2048, 8192), (1900, 20000)):
            q, keys, values = (normal(machine, n, heads, D) for n, heads in (
                (tokens, H), (tokens + before, K), (tokens + before, K)))  # fmt: skip
            parts = (attend(q, keys, values) for attend in (prompt_attention._joined, prompt_attention._by_torch))
            report.compared(f"attention in parts, {tokens} behind {before}", *parts, 0.02)


def check_paged_attention(
    report: Report, machine: Machine, c: ModelConfig, tolerance: float, lens: list[int], page: int
) -> None:
    """The kernel in each cache format, blocks of `page` tokens in any order, and a prompt beside decodes."""
    reference, kernels = ReferenceKernels(), CudaKernels()
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    counts = [-(-n // page) for n in lens]
    tables = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for row, blocks in zip(tables, torch.randperm(sum(counts)).int().split(counts), strict=True):
        row[: len(blocks)] = blocks
    everywhere = torch.arange(sum(counts) * page, device=machine.device)
    rotary = reference.rotary(everywhere, torch.rand(D // 2, device=machine.device))
    for cache_dtype in (machine.dtype, *([torch.float8_e4m3fn] if machine.reads_fp8 else []), torch.int8):
        caches, copies = (reference.empty_cache(sum(counts), page, K, D, cache_dtype, machine.device) for _ in range(2))
        qkv = torch.randn(len(everywhere), (H + 2 * K) * D, device=machine.device).to(machine.dtype)
        want_q = reference.rope_and_write(qkv, rotary, *caches, everywhere, H)
        with poisoned():
            got_q = kernels.rope_and_write(qkv, rotary, *copies, everywhere, H)
        report.compared(f"rope {cache_dtype}, blocks of {page}", got_q, want_q, tolerance)
        several = [min(length, 7) for length in lens]  # side by side, one call of what torch has
        for queries in ([1] * len(lens), [1] * (len(lens) - 1) + [3], several):
            starts = torch.tensor([0, *queries]).cumsum(0)
            spans = tuple(Span(int(s), n, length) for s, n, length in zip(starts, queries, lens, strict=False))
            nothing = torch.zeros(sum(queries), dtype=torch.int64, device=machine.device)
            lengths = torch.tensor(lens, dtype=torch.int32, device=machine.device)
            layout = Layout(nothing, nothing, tables.to(machine.device), starts.int(), lengths, spans, page)
            q = torch.randn(sum(queries), H, D, device=machine.device).to(machine.dtype)
            with poisoned():
                got = kernels.attention(q, *copies, layout)
            want = reference.attention(q, *caches, layout)
            report.compared(
                f"attention {cache_dtype}, blocks of {page}, {sum(queries)} of {len(lens)}",
                got,
                want,
                max(tolerance, 0.02),
            )


def rounded(matrices: Tensor, format: Any) -> Quantized:
    """One matrix, or a stack one by one: rounding takes several float copies, for which a small card has no room."""
    if matrices.dim() == 2:
        return quantize(matrices, format)
    each = [quantize(matrix, format) for matrix in matrices]
    return Quantized(torch.stack([q.data for q in each]), torch.stack([q.scales for q in each]), format)
