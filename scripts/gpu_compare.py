"""Our server and vLLM side by side: one checkpoint, one load generator over HTTP, one server at work at a time.

Knows how both are started and what makes a comparison fair. Knows nothing of how tokens are made.

Fair means here: the same files, bfloat16, the same longest request and, where both are tuned, the same number of
requests and tokens a step; prompts are token ids of which no two begin alike; every answer has exactly the length that
was asked for, which is checked; temperature 1 and nothing else of sampling, whatever generation_config.json says.
Prefix caching is off on both, or on on both. Each load is run three times, after the first and the largest, which are
not counted, and the odd rounds start with the other server. "defaults" leaves the rest to each server; "tuned" adds
vLLM's own expert tiles for the H100 where it has none for this card, without which it runs with tiles that nobody
chose.

Without --together each server has the GPU to itself, and its runs lie minutes from the other's. With it both start at
once, stay, and take turns, ours and theirs, then theirs and ours: a card that warms up or slows down does so to both.
Both have a cache of the same size. It cannot show what a server makes of a whole card: each has less room for its
cache, and does not choose its size. What a server times at its start to choose by, it times beside the other; that an
idle one takes nothing from the other is assumed.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import uvloop
from rich.console import Console
from rich.table import Table

from ernie_serve import bench
from ernie_serve.errors import SettingsError, StartupError
from ernie_serve.model.config import ModelConfig
from ernie_serve.text.tokenizer import Tokenizer

NAME = "compared"
LOADS = "1x1024x256,8x2048x512,32x2048x512,64x2048x512,128x2048x512,256x2048x512,1x8192x128,1x32768x64,64x1024x256@4"
METRICS = ("output_tok_s", "decode_tok_s", "ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99")
STREAMS = 64
TOLD = ("output_tok_s", "decode_tok_s", "ttft_ms_p50", "itl_ms_p50")
# No seeds: vLLM draws for each request that has one apart, a kernel for each of the batch.
PLAIN_SAMPLING = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": None}
INSTALL = (
    "Install it into an environment of its own (python -m venv V && V/bin/pip install vllm==0.26.0) and give "
    "--vllm V/bin/vllm; or name another server's command with --theirs."
)


@dataclass(frozen=True, slots=True)
class Side:
    """One server: how it is started, and what its requests say besides."""

    name: str
    command: list[str]
    environ: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one load."""

    variant: str
    side: str
    load: str
    result: bench.Result


class Exact:
    """A target whose every answer must have the length that was asked for."""

    def __init__(self, target: bench.HttpTarget) -> None:
        self._target = target

    async def stream(self, prompt: list[int], output_len: int, seed: int) -> AsyncIterator[int]:
        """Pass the counts on, and fail where they do not add up."""
        made = 0
        async for count in self._target.stream(prompt, output_len, seed):
            made += count
            yield count
        if made != output_len:
            raise StartupError(f"An answer has {made} tokens where {output_len} were asked for: nothing is comparable.")


def parse_load(text: str) -> bench.Load:
    """`64x2048x512` is 64 streams, prompts of 2,048 and answers of 512; `@4` makes it an open load of 4 a second."""
    try:
        shape, _, rate = text.partition("@")
        streams, input_len, output_len = (int(part) for part in shape.split("x"))
        arrivals = float(rate) if rate else None
        if min(streams, input_len, output_len) < 1 or (arrivals is not None and arrivals <= 0):
            raise ValueError
    except ValueError:
        raise SettingsError(
            f"--loads has {text!r}; a load is STREAMSxINPUTxOUTPUT or …@RATE, as 64x2048x512."
        ) from None
    num_prompts = 2 * streams if arrivals else max(3, streams)  # one wave, so that all are decoded together for a while
    return bench.Load(
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        max_concurrency=num_prompts if arrivals else streams,  # an open load waits for nobody
        request_rate=arrivals,
    )


def sides(args: argparse.Namespace, variant: str, config: dict[str, Any], loads: list[bench.Load]) -> list[Side]:
    """Both servers as a variant has them, ours first. Raises `SettingsError` where one cannot be had."""
    caching = "--enable-prefix-caching" if variant == "prefix" else "--no-enable-prefix-caching"
    longest = max(load.input_len + load.output_len for load in loads)
    shared = ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", "{port}", "--dtype", "bfloat16"]
    shared += ["--max-model-len", str(longest), caching]
    if args.together:  # vLLM asks for its share of the card's memory to be free at its start, though the cache is given
        size = args.kv_cache_memory_bytes or cache_bytes(ModelConfig.from_dict(config), loads)
        shared += ["--kv-cache-memory-bytes", str(size), "--gpu-memory-utilization", "0.4"]
    environ = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    if variant != "defaults":
        shared += ["--max-num-seqs", "256", "--max-num-batched-tokens", str(8192 + 256)]
        if folder := tuned_tiles(args, config):
            environ["VLLM_TUNED_CONFIG_FOLDER"] = folder
    ours = Side("ours", [sys.executable, "-m", "ernie_serve", "serve", "{model}", *shared])
    if args.ours:
        ours = Side("ours", shlex.split(args.ours))
    if args.theirs:
        return [ours, Side("theirs", shlex.split(args.theirs))]
    if not shutil.which(args.vllm):
        raise SettingsError(f"vLLM is not installed: there is no {args.vllm!r}. {INSTALL}")
    usage = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}  # a chunk may hold many tokens
    command = [args.vllm, "serve", "{model}", *shared, "--generation-config", "vllm"]
    return [ours, Side("vllm", command, environ, usage)]


def cache_bytes(config: ModelConfig, loads: list[bench.Load]) -> int:
    """What the largest load needs of a bfloat16 cache in blocks of 64 tokens, and a tenth."""
    blocks = max(load.max_concurrency * -(-(load.input_len + load.output_len) // 64) for load in loads)
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return blocks * 64 * token_bytes * 11 // 10


def tuned_tiles(args: argparse.Namespace, config: dict[str, Any]) -> str | None:
    """A folder with vLLM's expert tiles of the H100 under the name of this card; `None` where vLLM has its own."""
    executable = shutil.which(args.vllm)
    if args.theirs or executable is None:
        return None
    shape = f"E={config.get('moe_num_experts')},N={config.get('moe_intermediate_size')},device_name="
    card = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    named = f"{shape}{card[0].strip().replace(' ', '_')}.json" if card else ""
    python = Path(executable).resolve().parent.parent
    folder = next(python.glob("lib/python3*/site-packages/vllm/model_executor/layers/fused_moe/configs"), None)
    if folder is None or not named or (folder / named).exists():
        return None
    if not (found := sorted(folder.glob(f"{shape}NVIDIA_H100*.json"))):
        print(f"vLLM has no tiles {shape}NVIDIA_H100…: its tuned variant runs with its defaults.", file=sys.stderr)
        return None
    tiles = args.out.parent / "tiles"
    tiles.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found[-1], tiles / named)
    return str(tiles.resolve())


@contextmanager
def running(group: Sequence[Side], model: str, log_of: dict[str, Path]) -> Iterator[dict[str, str]]:
    """The servers of these sides, started at once and all ready, as addresses by name; ended on leaving.

    Raises `StartupError` with the last lines of one that ends before.
    """
    started: list[tuple[Side, subprocess.Popen[bytes], str]] = []
    with ExitStack() as ending:
        for side in group:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            command = [word.format(port=port, model=model, name=NAME) for word in side.command]
            with log_of[side.name].open("w") as out:
                process = subprocess.Popen(
                    command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | side.environ, start_new_session=True
                )
            ending.callback(_end, process)
            started.append((side, process, f"http://127.0.0.1:{port}"))
        while not all(_ready(root) for _, _, root in started):
            for side, process, _ in started:
                if process.poll() is not None:
                    last = "\n".join(log_of[side.name].read_text(errors="replace").splitlines()[-12:])
                    raise StartupError(f"{side.name} ended with {process.returncode} before it was ready:\n{last}")
            time.sleep(0.5)
        yield {side.name: root for side, _, root in started}


def _ready(root: str) -> bool:
    """Whether weights are loaded: ours says so at /health/ready; vLLM answers /health, and only then listens."""
    try:
        answer = httpx.get(f"{root}/health/ready", timeout=5)
        return (httpx.get(f"{root}/health", timeout=5) if answer.status_code == 404 else answer).status_code == 200
    except httpx.TransportError:
        return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(60)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # whatever it started must not hold the GPU's memory any longer
    process.wait()


def measure(pool: Executor, side: Side, root: str, load: bench.Load, vocab_size: int) -> bench.Result:
    """One load against one server, its requests sent by processes of `STREAMS` streams each.

    One process took 13,000 chunks a second of 256 streams and 28,000 of 64, on two cores: a GPU makes as many.
    """
    shares = -(-load.max_concurrency // STREAMS) if load.request_rate is None else 1
    parts = [
        replace(
            load,
            num_prompts=len(range(i, load.num_prompts, shares)),
            max_concurrency=len(range(i, load.max_concurrency, shares)),
            seed=1000 * i + load.seed,
        )
        for i in range(shares)
    ]
    sent = [pool.submit(_timelines, side, root, part, vocab_size) for part in parts]
    return bench.summarise(side.name, load, [line for each in sent for line in each.result()])


def _timelines(side: Side, root: str, load: bench.Load, vocab_size: int) -> list[bench.Timeline]:
    async def all_of_them() -> list[bench.Timeline]:
        target = bench.HttpTarget(f"{root}/v1", NAME, extra={**PLAIN_SAMPLING, **side.extra})
        try:
            return await bench.timelines(Exact(target), load, vocab_size)
        finally:
            await target.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(all_of_them())


def turns(texts: list[str], repeats: int, group: Sequence[Side]) -> Iterator[tuple[str, int, Side]]:
    """Load by load and repeat by repeat each side once; every second time the last one begins."""
    for turn, (text, repeat) in enumerate(itertools.product(texts, range(repeats))):
        for side in group if turn % 2 == 0 else reversed(group):
            yield text, repeat, side


def run(args: argparse.Namespace, config: dict[str, Any]) -> tuple[list[Measured], dict[str, Any]]:
    """Every variant, round, side, load and repeat; and what was run."""
    texts = args.loads.split(",")
    loads = {text: parse_load(text) for text in texts}
    variants = ["given"] if args.ours or args.theirs else args.variants.split(",")
    if unknown := set(variants) - {"given", "defaults", "tuned", "prefix"}:
        raise SettingsError(f"--variants has {', '.join(sorted(unknown))}; it takes defaults, tuned and prefix.")
    both_of = {variant: sides(args, variant, config, list(loads.values())) for variant in variants}
    vocab_size = Tokenizer.from_folder(Path(args.model)).vocab_size  # the network's has room for ids that nobody has
    found: list[Measured] = []
    so_far = args.out.with_suffix(".jsonl")
    so_far.write_text("")
    ran: dict[str, Any] = {"commands": {}, "versions": {}}
    warm_ups = [loads[texts[0]]]
    if (largest := max(loads.values(), key=lambda load: load.max_concurrency)) != warm_ups[0]:
        warm_ups.append(largest)  # for which all processes are started
    most = -(-largest.max_concurrency // STREAMS)
    with ProcessPoolExecutor(most, mp_context=multiprocessing.get_context("spawn")) as pool:
        for variant, both in both_of.items():
            logs = {side.name: args.out.with_suffix(f".{variant}.{side.name}.log") for side in both}
            for side in both:
                ran["commands"][f"{variant} {side.name}"] = {"command": side.command, "environment": side.environ}
            for round_ in range(args.rounds):
                order = both if round_ % 2 == 0 else both[::-1]
                for group in [order] if args.together else [[side] for side in order]:
                    with running(group, args.model, logs) as roots:
                        for side in group:
                            root = roots[side.name]
                            ran["versions"][side.name] = httpx.get(f"{root}/version").json().get("version")
                            for load in warm_ups:
                                measure(pool, side, root, load, vocab_size)
                        for text, repeat, side in turns(texts, args.repeats, group):
                            seeded = replace(loads[text], seed=1 + repeat + round_ * args.repeats)
                            result = measure(pool, side, roots[side.name], seeded, vocab_size)
                            found.append(Measured(variant, side.name, text, result))
                            with so_far.open("a") as lines:  # what a comparison leaves that is cut short
                                lines.write(json.dumps(asdict(found[-1])) + "\n")
                            told = ", ".join(f"{metric} {getattr(result, metric)}" for metric in TOLD)
                            print(f"{variant} {side.name} {text}: {told}", file=sys.stderr)
    return found, ran


def summary(found: list[Measured]) -> list[dict[str, Any]]:
    """For each variant and load the median and spread of both sides, and the ratio of ours to theirs."""
    points = []
    for variant, load in dict.fromkeys((each.variant, each.load) for each in found):
        point: dict[str, Any] = {"variant": variant, "load": load}
        here = [each for each in found if (each.variant, each.load) == (variant, load)]
        names = sorted({each.side for each in here}, key=lambda name: name != "ours")
        for name in names:
            results = [each.result for each in here if each.side == name]
            for metric in METRICS:
                values = sorted(getattr(result, metric) or 0.0 for result in results)
                point[f"{name}.{metric}"] = {"median": statistics.median(values), "spread": [values[0], values[-1]]}
        for metric in METRICS:
            ours, theirs = (point[f"{name}.{metric}"]["median"] for name in names)
            point[f"ratio.{metric}"] = round(ours / theirs, 3) if theirs else None
        points.append(point)
    return points


def show(points: list[dict[str, Any]]) -> None:
    """A table of medians: ours, theirs and the ratio."""
    table = Table("variant", "load", box=None, header_style="bold")
    for metric in METRICS:
        table.add_column(metric, justify="right")
    theirs = next(key for key in points[0] if key.endswith(METRICS[0]) and key.split(".")[0] not in ("ours", "ratio"))
    for point in points:
        cells = []
        for metric in METRICS:
            pair = (point[f"ours.{metric}"], point[f"{theirs.split('.')[0]}.{metric}"])
            cells.append(f"{pair[0]['median']:g} / {pair[1]['median']:g} = {point[f'ratio.{metric}']}")
        table.add_row(point["variant"], point["load"], *cells)
    Console(width=200).print(table)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main() -> None:
    """Compare, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the checkpoint, such as scripts/make_random_checkpoint writes")
    parser.add_argument("--vllm", default="vllm", help="the program of an installed vLLM")
    parser.add_argument("--ours", help="our server's command with {model}, {port} and {name}, instead of the variants'")
    parser.add_argument("--theirs", help="the other server's command, likewise: any that speaks the completions API")
    parser.add_argument("--variants", default="defaults,tuned,prefix")
    parser.add_argument("--loads", default=LOADS, help="STREAMSxINPUTxOUTPUT, with @RATE an open load")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="starts of each server; every second is in reverse order")
    parser.add_argument("--together", action="store_true", help="start both at once and measure them in turn")
    parser.add_argument(
        "--kv-cache-memory-bytes", type=int, help="of each with --together; default: for the largest load"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_compare.json"))
    args = parser.parse_args()
    try:
        if min(args.repeats, args.rounds) < 1:
            raise SettingsError("--repeats and --rounds are at least 1.")
        if args.kv_cache_memory_bytes and not args.together:
            raise SettingsError("--kv-cache-memory-bytes is for --together; alone, each server sizes its own cache.")
        config_file = Path(args.model) / "config.json"
        if not config_file.exists():
            raise SettingsError(f"{config_file} is not there: MODEL is the folder of a checkpoint.")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        found, ran = run(args, json.loads(config_file.read_text(encoding="utf-8")))
    except StartupError as error:
        sys.exit(f"gpu_compare: {error}")
    points = summary(found)
    show(points)
    facts = {
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "gpu": _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        **ran,
        "points": points,
        "runs": [asdict(each) for each in found],
    }
    args.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
