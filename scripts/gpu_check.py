"""One command that says whether the GPU path is right, and how near it comes to the floor.

Kernels beside the reference; a model of random weights made on the device, with its decode step as a graph and without;
decode and prefill speed, in each format; transformers beside it. Writes one JSON. `--minutes` bounds the run: what no
longer fits is left out by name. `--dry` runs all of its logic on a CPU, at a tiny geometry, in Triton's interpreter.
"""

import argparse
import asyncio
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from gpu_floor import Floor
from gpu_kernels import GROUPS, check_all_kernels, check_kernels, normal, rounded
from gpu_machine import PAGE, EagerDevice, Machine, Report, four_digits
from gpu_ways import measure_ways
from torch import Tensor

from ernie_serve.kernels.cuda import CudaKernels
from ernie_serve.kernels.fused_cuda import FusedCudaKernels
from ernie_serve.kernels.quantized import Quantized
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.kernels.triton import router
from ernie_serve.messages import UNKNOWN_TOKEN, PlanRow, SamplingParams, StepPlan
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.loading import load
from ernie_serve.model.quantize import bits_of, shapes_of
from ernie_serve.model.recipes import Quantization
from ernie_serve.worker.runner import Runner

FORMATS = ["bf16", "fp8", "int8", "int4"]
PARTS = ["kernels", "files", "models", "http", "transformers", "ways"]


def random_model(machine: Machine, format: Any) -> Ernie:
    """Random weights made on the device, layer by layer; router rows scaled so that routing spreads."""
    config = ModelConfig.from_dict(machine.values, source="gpu_check")
    with torch.device("meta"):
        model = Ernie(config, FusedCudaKernels(), machine.dtype)
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
    suffix: str = "",
) -> None:
    steps, repeats = (1, 1) if machine.dry else (48, 3)
    runner = make_runner(machine, model, streams, context, machine.recorder(), cache_dtype)
    decode(runner, streams, context, 1)
    run = partial(decode, runner, streams, context, top_p=top_p)
    seconds = min(machine.seconds(lambda: run(steps, 1)) for _ in range(repeats)) / steps
    name = f"decode_b{streams}_{context // 1024}k" + ("" if floor.format == "bf16" else f"_{floor.format}")
    name += ("_kv8" if cache_dtype else "") + ("_top_p" if top_p < 1 else "") + suffix
    kv_bytes = (cache_dtype or machine.dtype).itemsize
    hit = distinct_experts(machine, model, runner, streams, context)
    kernels = machine.kernel_times(lambda: run(4, 1), 4)
    report.point(
        name, streams, seconds, floor.decode_seconds(streams, context, kv_bytes), experts_a_layer=hit, kernels=kernels
    )


def measure_apart(report: Report, machine: Machine, model: Ernie, floor: Floor) -> None:
    """One stream by the kernels of several rows, for what fusing saves."""
    fused, plain = model.kernels, CudaKernels()
    parts = [part for part in model.modules() if getattr(part, "kernels", None) is fused]
    try:
        for part in parts:
            part.kernels = plain
        measure_decode(report, machine, model, floor, 1, 16 if machine.dry else 1024, suffix="_apart")
    finally:
        for part in parts:
            part.kernels = fused


def distinct_experts(machine: Machine, model: Ernie, runner: Runner, streams: int, context: int) -> float:
    """Experts that a step touches in a layer, on average: random weights may collapse, and then nothing is measured."""
    if streams == 1:
        return float(model.config.moe_k)  # chosen within the kernel that reads them
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
    """A graph and the same step without one make the same tokens, all of them: of one stream, and of several."""
    report.values["graph_equals_eager"] = True
    for streams, context, steps in ((1, 16, 2), (2, 16, 2)) if machine.dry else ((1, 1024, 16), (8, 1024, 16)):
        found = []
        for device in (machine.recorder(), EagerDevice()):
            torch.manual_seed(3)
            found.append(decode(make_runner(machine, model, streams, context, device), streams, context, steps))
        report.values["distinct_tokens"] = len({token for step in found[0] for token in step})
        if found[0] != found[1]:
            report.values["graph_equals_eager"] = False
            report.values["failed"].append(f"graph of {streams}: its tokens differ from those of the step without one")


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
            speed = f"{result.target:6} {result.concurrency:3} streams {result.decode_tok_s or 0:8} tok/s"
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
    options.add_argument(
        "--layers", type=int, help="of the models: 3 compile all that 28 need, and their times say little"
    )
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these parts")
    options.add_argument("--kernels", choices=GROUPS, help="check these kernels and nothing else")
    given = options.parse_args(arguments)
    if not given.dry and not torch.cuda.is_available():
        print("gpu_check: this PyTorch sees no GPU; --dry checks its logic on a CPU.", file=sys.stderr)
        return 2
    report, machine = Report(given.minutes), Machine(given.dry, given.layers)
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
        report.values |= {"bandwidth": four_digits(bandwidth), "arithmetic": four_digits(arithmetic)}
        for format in given.formats:
            if format == "fp8" and not machine.reads_fp8:
                report.values["left_out"].append("fp8: this card does not read it")
                continue
            run_format(report, machine, format, bandwidth * 1e12, arithmetic * 1e12)
            machine.let_go()
    others = {
        "http": (60, ("fastapi", "uvicorn"), measure_http),
        "transformers": (40, ("transformers",), measure_transformers),
        "ways": (90, (), measure_ways),
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
    if format in ("bf16", "fp8"):
        report.part(f"{format} decode of one stream, apart", 6, lambda: measure_apart(report, machine, model, floor))
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
