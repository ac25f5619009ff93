"""One command that says whether the GPU path is right, and how near it comes to the floor.

Kernels beside the reference; a model of random weights made on the device, with its decode step as a graph and without;
decode and prefill speed, in each format; transformers beside it. Writes one JSON. `--minutes` bounds the run: what no
longer fits is left out by name. `--dry` runs all of its logic on a CPU, at a tiny geometry, in Triton's interpreter.
"""

import argparse
import asyncio
import dataclasses
import gc
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import triton
from gpu_floor import Floor
from torch import Tensor

from ernie_serve.kernels import prompt_attention
from ernie_serve.kernels.cuda import CudaKernels
from ernie_serve.kernels.layout import Layout, Span
from ernie_serve.kernels.quantized import Quantized, quantize
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.kernels.triton import router
from ernie_serve.messages import UNKNOWN_TOKEN, PlanRow, SamplingParams, StepPlan
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.loading import FP8_CAPABILITY, load
from ernie_serve.model.quantize import bits_of, shapes_of
from ernie_serve.model.recipes import Quantization
from ernie_serve.worker.card import card_of
from ernie_serve.worker.graphs import CudaDevice
from ernie_serve.worker.runner import Runner
from ernie_serve.worker.sampler import Sampler, uniform

FULL: dict[str, Any] = {
    "model_type": "ernie4_5_moe", "vocab_size": 103424, "hidden_size": 2560, "intermediate_size": 12288,
    "num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4, "head_dim": 128,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "moe_num_experts": 64, "moe_k": 6, "moe_intermediate_size": 1536, "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1, "moe_layer_end_index": 27, "moe_layer_interval": 1,
}  # fmt: skip
TINY = FULL | {
    "vocab_size": 300, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 5,
    "num_key_value_heads": 1, "head_dim": 16, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 128,
    "moe_num_shared_experts": 1, "moe_layer_end_index": 1, "max_position_embeddings": 256,
}  # fmt: skip
PAGE = 64
FORMATS = ["bf16", "fp8", "int8", "int4"]
PARTS = ["kernels", "files", "models", "http", "transformers"]


class Machine:
    """Where it runs: the device, and how to wait for it."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.values = TINY if dry else FULL

    def recorder(self) -> Any:
        """What records steps; a new one for each model and cache, since the memory of its graphs dies with them."""
        return EagerDevice() if self.dry else CudaDevice()

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def let_go(self) -> None:
        """Give the memory of what is no longer held back."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], object]) -> float:
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began

    @property
    def reads_fp8(self) -> bool:
        return self.dry or torch.cuda.get_device_capability() >= FP8_CAPABILITY

    def rates(self) -> tuple[float, float]:
        """TB/s and TFLOP/s of the floor: as chosen for an H200, of others what reading and one large product reach."""
        if self.dry or torch.cuda.get_device_name() == "NVIDIA H200":
            return 4.3, 790.0
        left, right = (torch.randn(8192, 8192, device=self.device).to(self.dtype) for _ in range(2))
        fastest = min(self.seconds(lambda: left @ right) for _ in range(10))
        return card_of(torch.device("cuda", 0), 1.0).bytes_per_second / 1e12, 2 * 8192**3 / fastest / 1e12

    def kernel_times(self, run: Callable[[], object], steps: int) -> dict[str, list[float]]:
        """Launches and microseconds a step of each kernel that `run` takes, the longest first."""
        if self.dry:
            return {}
        try:
            return self._profiled(run, steps)
        except Exception as error:  # a machine without the profiler still measures
            return {f"{type(error).__name__}: {error}": [0.0, 0.0]}

    def _profiled(self, run: Callable[[], object], steps: int) -> dict[str, list[float]]:
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            self.wait()
            run()
            self.wait()
        found: dict[str, list[float]] = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                entry = found.setdefault(event.name[:60], [0.0, 0.0])
                entry[0] += 1 / steps
                entry[1] += event.device_time_total / steps
        longest = sorted(found.items(), key=lambda item: -item[1][1])[:16]
        return {name: [round(count, 2), round(spent, 1)] for name, (count, spent) in longest}

    def described(self) -> dict[str, Any]:
        found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
        found |= {"triton": triton.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
        if not self.dry:
            properties = torch.cuda.get_device_properties(0)
            found |= {"gpu": properties.name, "gpu_gib": round(properties.total_memory / 2**30, 1)}
            found |= {"cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability(0)}
        return found


class EagerDevice:
    """Records nothing and runs everything: what a graph has to agree with, bit for bit."""

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def record(self, run: Callable[[], None]) -> Callable[[], object]:
        return run

    def read(self, tensor: Tensor) -> Callable[[], list[int]]:
        return tensor.clone().tolist


class Report:
    """What is found, and how much time is left to find more."""

    def __init__(self, minutes: float) -> None:
        self._ends = time.monotonic() + 60 * minutes
        self.values: dict[str, Any] = {"points": [], "kernels": [], "left_out": [], "failed": []}

    def part(self, name: str, needs_seconds: float, run: Callable[[], None]) -> None:
        """Run a part if there is time for it; a part that fails is told, and the others go on."""
        left = self._ends - time.monotonic()
        if left < needs_seconds:
            self.values["left_out"].append(f"{name}: needs about {needs_seconds:.0f} s, {max(0, left):.0f} were left")
            return
        print(f"== {name} ({left:.0f} s left)", flush=True)
        try:
            run()
        except torch.OutOfMemoryError as error:  # a smaller card than the H200 that the parts are sized for
            self.values["left_out"].append(f"{name}: has no room: {str(error).splitlines()[0][:200]}")
            print("   left out: it has no room here", flush=True)
        except Exception as error:
            self.values["failed"].append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            print(f"   FAILED {type(error).__name__}: {error}", flush=True)

    def point(self, name: str, tokens: int, seconds: float, floor: float, **more: Any) -> None:
        found = {"name": name, "tok_s": _four_digits(tokens / seconds), "ms": round(1e3 * seconds, 3)}
        self.values["points"].append(found | {"share": _four_digits(floor / seconds)} | more)
        print(
            f"   {name:24} {found['tok_s']:>10} tok/s {found['ms']:>10} ms  {100 * floor / seconds:5.1f} %", flush=True
        )

    def compared(self, name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
        """One kernel's result beside the reference: the largest error over the largest value."""
        error = float((got.float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1e-9))
        is_right = error <= tolerance  # not a number is not right
        self.values["kernels"].append({"name": name, "error": error, "tolerance": tolerance, "right": is_right})
        if not is_right:
            self.values["failed"].append(f"kernel {name}: relative error {error:.3g}, at most {tolerance} is right")
            print(f"   WRONG {name}: {error:.3g}", flush=True)


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


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
        run = [sys.executable, __file__, "--kernels"]
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
    for lens, page in [([5, 18], 8)] if machine.dry else [([1, 64, 1000, 5000], PAGE), ([300] * 69 + [1], 16)]:
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
        for queries in ([1] * len(lens), [1] * (len(lens) - 1) + [3]):
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
                f"attention {cache_dtype}, blocks of {page}, queries={queries[-1]}", got, want, max(tolerance, 0.02)
            )


def random_model(machine: Machine, format: Any) -> Ernie:
    """Random weights made on the device, layer by layer; router rows scaled so that routing spreads."""
    config = ModelConfig.from_dict(machine.values, source="gpu_check")
    with torch.device("meta"):
        model = Ernie(config, CudaKernels(), machine.dtype)
    quantized = {} if format == "bf16" else bits_of(shapes_of(model), Quantization.of(format, "cuda"))
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty(parameter.shape, dtype=parameter.dtype, device=machine.device)
            if path.endswith("norm"):
                made.fill_(1.0)
            else:
                made.normal_(0, 1e-3 if name == "correction_bias" else made.shape[-1] ** -0.5)
            if form := quantized.get(f"{path}.{name}"):  # never the whole model in 16 bit: each is let go
                delattr(module, name)
                setattr(module, name, rounded(made, form))
            else:
                setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
    return model


def rounded(matrices: Tensor, format: Any) -> Quantized:
    """One matrix, or a stack one by one: rounding takes several float copies, for which a small card has no room."""
    if matrices.dim() == 2:
        return quantize(matrices, format)
    each = [quantize(matrix, format) for matrix in matrices]
    return Quantized(torch.stack([q.data for q in each]), torch.stack([q.scales for q in each]), format)


def rows_at(streams: int, context: int, step: int, unknown: bool, seed: int = 1, top_p: float = 1.0) -> list[PlanRow]:
    """Decodes of texts that all have `context` tokens in their own blocks, `step` tokens later."""
    blocks = -(-(context + 256) // PAGE)
    return [
        PlanRow(
            request_id=str(r), token_ids=[UNKNOWN_TOKEN if unknown else 7 + r], start=context - 1 + step,
            block_ids=list(range(r * blocks, (r + 1) * blocks)),
            sampling=SamplingParams(max_tokens=9999, seed=seed + r, top_p=top_p), wants_token=True,
            prompt_token_ids=[7 + r] * context, output_token_ids=[],
        )
        for r in range(streams)
    ]  # fmt: skip


def make_runner(
    machine: Machine, model: Ernie, streams: int, context: int, device: Any, cache_dtype: torch.dtype | None = None
) -> Runner:
    machine.let_go()  # of the cache before
    blocks = streams * -(-(context + 256) // PAGE)
    runner = Runner(
        model, blocks, PAGE, max_num_seqs=streams, device=device, max_model_len=context + 256,
        num_valid_ids=model.config.vocab_size, cache_dtype=cache_dtype,
    )  # fmt: skip
    for pair in runner.cache:
        for tensor in pair:
            tensor.copy_(torch.randn(tensor.shape, device=machine.device))
    return runner


def decode(
    runner: Runner, streams: int, context: int, steps: int, first: int = 0, top_p: float = 1.0
) -> list[list[int]]:
    """Steps that overlap as the engine's do: the next is launched before the tokens of this one are read."""
    tokens, flight = [], None
    for step in range(first, first + steps):
        rows = rows_at(streams, context, step, unknown=step > 0, top_p=top_p)
        ahead = runner.launch(StepPlan(step, rows))
        assert ahead is not None, "these rows can be recorded"
        if flight is not None:
            tokens.append([each.token_id for each in runner.collect(flight)])
        flight = ahead
    assert flight is not None
    return [*tokens, [each.token_id for each in runner.collect(flight)]]


def measure_decode(
    report: Report,
    machine: Machine,
    model: Ernie,
    floor: Floor,
    streams: int,
    context: int,
    cache_dtype: torch.dtype | None = None,
    top_p: float = 1.0,
) -> None:
    steps, repeats = (1, 1) if machine.dry else (48, 3)
    runner = make_runner(machine, model, streams, context, machine.recorder(), cache_dtype)
    decode(runner, streams, context, 1)
    run = partial(decode, runner, streams, context, top_p=top_p)
    seconds = min(machine.seconds(lambda: run(steps, 1)) for _ in range(repeats)) / steps
    name = f"decode_b{streams}_{context // 1024}k" + ("" if floor.format == "bf16" else f"_{floor.format}")
    name += ("_kv8" if cache_dtype else "") + ("_top_p" if top_p < 1 else "")
    kv_bytes = (cache_dtype or machine.dtype).itemsize
    hit = distinct_experts(machine, model, runner, streams, context)
    kernels = machine.kernel_times(lambda: run(4, 1), 4)
    report.point(
        name, streams, seconds, floor.decode_seconds(streams, context, kv_bytes), experts_a_layer=hit, kernels=kernels
    )


def distinct_experts(machine: Machine, model: Ernie, runner: Runner, streams: int, context: int) -> float:
    """Experts that a step touches in a layer, on average: random weights may collapse, and then nothing is measured."""
    seen, route = [], router.route

    def counted(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        weights, ids = route(*args, **named)
        seen.append(len(ids.unique()))
        return weights, ids

    router.route = counted  # for one step
    try:
        runner.execute(StepPlan(1, rows_at(streams, context, 0, unknown=False)))
    finally:
        router.route = route
    return round(sum(seen) / max(1, len(seen)), 2)


def check_graphs(report: Report, machine: Machine, model: Ernie) -> None:
    """A graph and the same step without one make the same tokens, all of them."""
    streams, context, steps = (2, 16, 2) if machine.dry else (8, 1024, 16)
    found = []
    for device in (machine.recorder(), EagerDevice()):
        torch.manual_seed(3)
        found.append(decode(make_runner(machine, model, streams, context, device), streams, context, steps))
    report.values["graph_equals_eager"] = found[0] == found[1]
    report.values["distinct_tokens"] = len({token for step in found[0] for token in step})
    if found[0] != found[1]:
        report.values["failed"].append("graph: its tokens differ from those of the same step without a graph")


def measure_prefill(report: Report, machine: Machine, model: Ernie, floor: Floor, tokens: int) -> None:
    chunk = 16 if machine.dry else 8192
    runner = make_runner(machine, model, 1, tokens, None)
    prompt = [i * 7919 % model.config.vocab_size for i in range(tokens)]
    (row,) = rows_at(1, tokens, 0, unknown=False)

    def run() -> None:
        for start in range(0, tokens, chunk):
            runner.execute(StepPlan(1, [PlanRow(
                request_id=f"p{time.monotonic_ns()}", token_ids=prompt[start : start + chunk], start=start,
                block_ids=row.block_ids, sampling=row.sampling, wants_token=start + chunk >= tokens,
                prompt_token_ids=prompt, output_token_ids=[],
            )]))  # fmt: skip

    is_long = tokens > 65536  # too long to run it thrice; shorter ones have compiled all of it
    if not is_long:
        run()
    seconds = machine.seconds(run)
    kernels = {} if is_long else machine.kernel_times(run, 1)
    report.point(f"prefill_{tokens // 1024}k", tokens, seconds, floor.prefill_seconds(tokens), kernels=kernels)


def measure_new_lengths(report: Report, machine: Machine, model: Ernie) -> None:
    """Prompts of lengths that nobody has sent before, the first time and the second; and cuDNN's attention alone.

    What compiles or plans for a length, and the host's work for many short prompts in one step, shows here only.
    """
    lengths = (19, 21) if machine.dry else (300, 777, 1501, 1503, 2049, 3001, 5003)
    found = []
    runner = make_runner(machine, model, 64, 256, None)
    for length in lengths:
        rows = rows_at(1, length, 0, unknown=False)
        prompt = [PlanRow(
            request_id="p", token_ids=[5] * length, start=0, block_ids=rows[0].block_ids, sampling=rows[0].sampling,
            wants_token=True, prompt_token_ids=[5] * length, output_token_ids=[],
        )]  # fmt: skip
        first, again = (machine.seconds(lambda p=prompt: runner.execute(StepPlan(1, p))) for _ in range(2))
        found.append({"tokens": length, "first_ms": round(1e3 * first, 2), "again_ms": round(1e3 * again, 2)})
    many, each = (2, 4) if machine.dry else (64, 128)
    rows = rows_at(many, each, 0, unknown=False)
    short = StepPlan(1, [PlanRow(
        request_id=row.request_id, token_ids=[5] * each, start=0, block_ids=row.block_ids, sampling=row.sampling,
        wants_token=True, prompt_token_ids=[5] * each, output_token_ids=[],
    ) for row in rows])  # fmt: skip
    runner.execute(short)
    report.values["short_prompts"] = {"prompts": many, "tokens": each}
    report.values["short_prompts"]["ms"] = round(1e3 * machine.seconds(lambda: runner.execute(short)), 2)
    report.values["new_lengths"] = found
    c = model.config
    alone = []
    for length in () if machine.dry else (1511, 1513):
        q, k, v = (normal(machine, 1, length, heads, c.head_dim).transpose(1, 2) for heads in (
            c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads))  # fmt: skip
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            first, again = (
                machine.seconds(lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True)) for _ in range(2))  # fmt: skip
        alone.append({"tokens": length, "first_ms": round(1e3 * first, 2), "again_ms": round(1e3 * again, 3)})
    report.values["cudnn_alone"] = alone


def measure_transformers(report: Report, machine: Machine) -> None:
    """`generate` of transformers at the same geometry, one stream: an anchor that anybody can check."""
    import transformers

    values = {k: v for k, v in machine.values.items() if k != "model_type"}
    config = transformers.Ernie4_5_MoeConfig(**values, experts_implementation="grouped_mm")
    before = torch.get_default_dtype()
    torch.set_default_dtype(machine.dtype)
    try:
        with torch.device(machine.device):
            model = transformers.Ernie4_5_MoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    context, new = (16, 2) if machine.dry else (1024, 32)
    prompt = torch.randint(3, config.vocab_size, (1, context), device=machine.device)

    def run(count: int) -> Callable[[], object]:
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": True, "pad_token_id": 0}
        return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    with torch.inference_mode():
        machine.seconds(run(1))
        seconds = (machine.seconds(run(new + 1)) - machine.seconds(run(1))) / new
    report.values["transformers"] = {
        "version": transformers.__version__, "decode_b1_1k_tok_s": round(1 / max(seconds, 1e-9), 1)
    }  # fmt: skip


def check_files(report: Report, machine: Machine) -> None:
    """Files, plain and quantized, read into the device: byte for byte what a CPU reads, and rounded there alike."""
    from ernie_serve.model.quantize_folder import quantize_folder
    from ernie_serve.model.random_checkpoint import write_random_checkpoint

    cpu = torch.device("cpu")
    recipes: list[Any] = ["int8"] if machine.dry else ["int8", "int4", *(["fp8"] if machine.reads_fp8 else [])]
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        write_random_checkpoint(plain, "tiny" if machine.dry else "21b", layers=2)
        for recipe in (None, *recipes):
            quantization = Quantization.of(recipe, "cuda") if recipe else None
            want = held(loaded(plain, quantization, cpu))
            began = time.perf_counter()
            got = held(loaded(plain, quantization, machine.device))
            machine.wait()
            seconds = round(time.perf_counter() - began, 2)
            report.values.setdefault("files", {})[recipe or "plain"] = seconds
            report.compared(f"files {recipe or 'plain'}", alike(got, want), torch.ones(()), 1e-5 if recipe else 0.0)
            if quantization:
                written = Path(folder) / str(recipe)
                quantize_folder(plain, written, quantization)
                got = held(loaded(written, None, machine.device))
                report.compared(f"files {recipe} from a folder", alike(got, want), torch.ones(()), 0.0)


def loaded(folder: Path, quantization: Quantization | None, device: torch.device) -> Ernie:
    config = ModelConfig.from_folder(folder)
    with torch.device("meta"):
        model = Ernie(config, ReferenceKernels(), torch.bfloat16)
    load(model, folder, quantization, device=device)
    return model


def held(model: Ernie) -> dict[str, Tensor]:
    """All tensors of a model by name, those of quantized matrices as well."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            parts = {"data": value.data, "scales": value.scales} if isinstance(value, Quantized) else {"": value}
            found |= {f"{path}.{name}.{part}": each for part, each in parts.items() if isinstance(each, Tensor)}
    return found


def alike(got: dict[str, Tensor], want: dict[str, Tensor]) -> Tensor:
    """The share of bytes that are the same."""
    assert got.keys() == want.keys()
    pairs = [
        (got[name].cpu().view(-1).view(torch.uint8), each.view(-1).view(torch.uint8)) for name, each in want.items()
    ]
    same, total = sum(int((one == other).sum()) for one, other in pairs), sum(len(one) for one, _ in pairs)
    return torch.tensor(same / total)


def measure_http(report: Report, machine: Machine) -> None:
    """The server itself, of weights that nobody has: its start, and what a client sees beside the engine alone."""
    from ernie_serve import bench, config
    from ernie_serve.model.random_checkpoint import write_random_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "checkpoint"
        write_random_checkpoint(where, "tiny" if machine.dry else "21b", has_weights=False)
        flags: dict[str, Any] = {"model": str(where), "load_format": "dummy", "enable_prefix_caching": False}
        flags |= {"log_level": "warning", "max_num_seqs": 64, "max_model_len": 64 if machine.dry else 4096}
        settings, _ = config.load(flags | {"device": machine.device.type}, environ={})
        sizes = [(1, 1, 8, 4)] if machine.dry else [(1, 4, 1024, 128), (64, 128, 1024, 256)]
        loads = [
            bench.Load(max_concurrency=streams, num_prompts=requests, input_len=given, output_len=made)
            for streams, requests, given, made in sizes
        ]
        began = time.monotonic()
        results = asyncio.run(bench.measure_offline_and_http(settings, loads, "both"))
        report.values["http"] = [dataclasses.asdict(result) for result in results]
        for result in results:
            speed = f"{result.target:6} {result.concurrency:3} streams {result.decode_tok_s:8} tok/s"
            print(f"   {speed}, first token {result.ttft_ms_p50} ms, between {result.itl_ms_p50} ms", flush=True)
        print(f"   {time.monotonic() - began:.0f} s with its start", flush=True)


def commit() -> str:
    """The commit that is checked: `GPU_CHECK_COMMIT` says it of files that came without their history."""
    if told := os.environ.get("GPU_CHECK_COMMIT"):
        return told
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=8.5, help="how long the run may take")
    options.add_argument("--out", type=Path, help="the JSON; docs/benchmarks/<date>-<gpu>.json if not given")
    options.add_argument("--dry", action="store_true", help="on a CPU, tiny, in Triton's interpreter")
    options.add_argument("--bandwidth", type=float, help="TB/s of the floor; of an H200 4.3, of others as measured")
    options.add_argument("--arithmetic", type=float, help="TFLOP/s of the floor; of an H200 790, of others as measured")
    options.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="of the weights, in this order")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these parts")
    options.add_argument("--kernels", choices=GROUPS, help="check these kernels and nothing else")
    given = options.parse_args(arguments)
    if not given.dry and not torch.cuda.is_available():
        print("gpu_check: this PyTorch sees no GPU; --dry checks its logic on a CPU.", file=sys.stderr)
        return 2
    report, machine = Report(given.minutes), Machine(given.dry)
    report.values |= {"commit": commit(), "dry": given.dry, "began": datetime.now(UTC).isoformat(timespec="seconds")}
    report.values |= {"machine": machine.described()}
    if given.kernels:
        report.part(f"kernels {given.kernels}", 0, lambda: check_kernels(report, machine, given.kernels))
    else:
        run_parts(report, machine, given)
    gpu = "dry" if given.dry else machine.described()["gpu"].lower().replace("nvidia ", "").replace(" ", "-")
    out = given.out or Path(f"docs/benchmarks/{datetime.now(UTC):%Y-%m-%d}-{gpu}.json")
    out.write_text(json.dumps(report.values, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: {len(report.values['points'])} points, {len(report.values['failed'])} failures")
    return 1 if report.values["failed"] else 0


def run_parts(report: Report, machine: Machine, given: argparse.Namespace) -> None:
    """The kernels, a model of each format, the server, transformers; what cannot be or is not wanted is named."""
    if "kernels" in given.parts:
        report.part("kernels", 60, lambda: check_all_kernels(report, machine))
    if "files" in given.parts:
        report.part("files", 45, lambda: check_files(report, machine))
    if "models" in given.parts:
        bandwidth, arithmetic = machine.rates()
        bandwidth, arithmetic = given.bandwidth or bandwidth, given.arithmetic or arithmetic
        report.values |= {"bandwidth": _four_digits(bandwidth), "arithmetic": _four_digits(arithmetic)}
        for format in given.formats:
            if format == "fp8" and not machine.reads_fp8:
                report.values["left_out"].append("fp8: this card does not read it")
                continue
            run_format(report, machine, format, bandwidth * 1e12, arithmetic * 1e12)
            machine.let_go()
    others = {
        "http": (60, ("fastapi", "uvicorn"), measure_http),
        "transformers": (40, ("transformers",), measure_transformers),
    }
    for name, (seconds, needs, measure) in others.items():
        if missing := [each for each in needs if not importlib.util.find_spec(each)]:
            report.values["left_out"].append(f"{name}: {' and '.join(missing)} missing")
        elif name in given.parts:
            report.part(name, seconds, lambda measure=measure: measure(report, machine))
    report.values["left_out"] += [f"{name}: not asked for" for name in PARTS if name not in given.parts]


def run_format(report: Report, machine: Machine, format: str, bandwidth: float, arithmetic: float) -> None:
    """All parts of one weight format; the model is made once and let go before the next."""
    models: list[Ernie] = []
    report.part(f"{format} model", 30, lambda: models.append(random_model(machine, format)))
    if not models:
        return
    (model,) = models
    floor = Floor(model.config, bandwidth, arithmetic, format)
    if format == "bf16":
        report.part("graph equals eager", 20, lambda: check_graphs(report, machine, model))
    full = [(1, 1024), (8, 2048), (64, 2048), (256, 2048), (32, 2048), (128, 2048), (64, 1024), (256, 1024)]
    wanted = {"bf16": full, "fp8": [*full[:4], (64, 1024)]}.get(format, full[:4])
    points = [(1, 16), (2, 16)][: 1 + (format == "bf16")] if machine.dry else wanted
    for streams, context in points:
        report.part(f"{format} decode {streams} x {context}", 6,
                    lambda s=streams, c=context: measure_decode(report, machine, model, floor, s, c))  # fmt: skip
    if format in ("bf16", "fp8") and machine.reads_fp8:
        streams, context = (1, 16) if machine.dry else (64, 2048)
        report.part(f"{format} decode {streams} x {context}, fp8 cache", 6, lambda: measure_decode(
            report, machine, model, floor, streams, context, torch.float8_e4m3fn))  # fmt: skip
    if format == "bf16":
        for streams, context in [(1, 16)] if machine.dry else [(1, 1024), (64, 2048)]:  # as many clients ask
            report.part(f"{format} decode {streams} x {context}, top_p", 6, lambda s=streams, c=context: measure_decode(
                report, machine, model, floor, s, c, top_p=0.8))  # fmt: skip
        for tokens in (24,) if machine.dry else (8192, 1024, 32768, 131072):
            report.part(f"prefill {tokens}", 5 + tokens / 5000,
                        lambda n=tokens: measure_prefill(report, machine, model, floor, n))  # fmt: skip
        report.part("prompts of new lengths", 15, lambda: measure_new_lengths(report, machine, model))


if __name__ == "__main__":
    sys.exit(main())
