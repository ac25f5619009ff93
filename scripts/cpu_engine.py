"""One turn of `bench_cpu`: the whole engine over a quantized folder, stepped in this thread, timed, printed as JSON.

Knows the engine. Knows nothing of what it is compared with.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ernie_serve.config import Settings
from ernie_serve.engine.core import EngineCore
from ernie_serve.engine_process import build_engine
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.messages import EngineRequest, PlanRow, SamplingParams, StepPlan
from ernie_serve.model.config import ModelConfig
from ernie_serve.text.tokenizer import Tokenizer
from ernie_serve.worker.memory import bytes_per_block

CONTEXT = 4096  # tokens that the cache holds, so that the peak of memory is that of such a context
BLOCK = 16


def engine(folder: Path, threads: int, cache_tokens: int) -> EngineCore:
    """An engine whose cache holds so many tokens."""
    config = ModelConfig.from_folder(folder)
    blocks = cache_tokens // BLOCK
    settings = Settings(
        model=str(folder),
        threads=threads,
        block_size=BLOCK,
        max_model_len=cache_tokens,
        kv_cache_memory_bytes=blocks * bytes_per_block(config, getattr(torch, config.dtype), BLOCK),
        max_num_seqs=16,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )
    core, _ = build_engine(settings, Tokenizer.from_folder(folder).vocab_size, lambda share, what: None)
    return core


def request(request_id: str, prompt: list[int], new: int) -> EngineRequest:
    """A greedy one, of so many new tokens."""
    sampling = SamplingParams(max_tokens=new, seed=0, temperature=0.0)
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling)


def prompts(count: int, input_len: int) -> list[list[int]]:
    """Random ids, so that experts are chosen as by a text: equal ids would all choose the same ones."""
    chance = torch.Generator().manual_seed(count)
    drawn: list[list[int]] = torch.randint(5, 100_000, (count, input_len), generator=chance).tolist()
    return drawn


def steps(core: EngineCore, num_streams: int, input_len: int, new: int) -> list[tuple[int, float]]:
    """Tokens made and seconds of each step of some requests that start together."""
    for index, prompt in enumerate(prompts(num_streams, input_len)):
        core.add(request(str(index), prompt, new))
    found = []
    while core.has_work:
        began = time.perf_counter()
        outputs = core.step()
        found.append((sum(len(output.token_ids) for output in outputs), time.perf_counter() - began))
    return found


def decode_speed(core: EngineCore, num_streams: int, new: int) -> float:
    """Tokens a second over all streams, once each has its first."""
    counted = steps(core, num_streams, 16, new)
    whole = [(count, seconds) for count, seconds in counted[1:] if count == num_streams]
    return sum(count for count, _ in whole) / sum(seconds for _, seconds in whole)


def prefill_speed(core: EngineCore, input_len: int) -> float:
    """Tokens of a prompt a second, to its first token."""
    return input_len / sum(seconds for _, seconds in steps(core, 1, input_len, 1))


def depth_speed(core: EngineCore, depth: int) -> float:
    """Tokens a second of one stream that has so many tokens in the cache. They were never computed, only read."""
    prompt = [5] * depth
    row = PlanRow(
        request_id="deep",
        token_ids=[5],
        start=depth - 1,
        block_ids=list(range(depth // BLOCK)),
        sampling=SamplingParams(max_tokens=1, seed=0, temperature=0.0),
        wants_token=True,
        prompt_token_ids=prompt,
        output_token_ids=[],
    )
    taken = []
    for step in range(17):
        began = time.perf_counter()
        core.runner.execute(StepPlan(step, [row]))
        taken.append(time.perf_counter() - began)
    return 1 / statistics.median(taken[1:])


def experts_reached(model: Any, run: Callable[[], object]) -> float:
    """Distinct experts a layer that the last step of a run reads, on average."""
    seen: list[int] = []
    kernels, route = model.kernels, model.kernels.route

    def spy(*arguments: Any) -> Any:
        weights, ids = route(*arguments)
        seen.append(len(set(ids.flatten().tolist())))
        return weights, ids

    kernels.route = spy
    kernels.moe = partial(ReferenceKernels.moe, kernels)  # which asks `route`
    run()
    del kernels.route, kernels.moe
    layers = sum(model.config.is_moe_layer(index) for index in range(model.config.num_hidden_layers))
    return statistics.mean(seen[-layers:])


class Timed:
    """The CPU's operators, with the seconds that were spent in them."""

    def __init__(self, operators: Any) -> None:
        self.operators = operators
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self.operators, name)

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            answer = operator(*arguments)
            self.seconds += time.perf_counter() - began
            return answer

        setattr(self, name, timed)  # found at once from now on, so that measuring takes little itself
        return timed


def share_outside(core: EngineCore) -> float:
    """Of the time of decode steps of one stream, what the kernels do not take: scheduler, Python, calls, sampling."""
    kernels = core.runner.model.kernels  # type: ignore[attr-defined]
    kernels._ops = timed = Timed(kernels._ops)
    shares = []
    core.add(request("outside", [5] * 16, 33))
    while core.has_work:
        timed.seconds, began = 0.0, time.perf_counter()
        core.step()
        shares.append(1 - timed.seconds / (time.perf_counter() - began))
    kernels._ops = timed.operators
    return statistics.median(shares[1:])


def stall(core: EngineCore, input_len: int) -> dict[str, float]:
    """One stream decodes and a prompt arrives: seconds of its step alone, and of the usual and longest beside that."""
    core.add(request("stream", [5] * 16, CONTEXT - input_len - 64))
    alone, beside = [], []
    for _ in range(12):
        began = time.perf_counter()
        core.step()
        alone.append(time.perf_counter() - began)
    core.add(request("prompt", *prompts(1, input_len), 1))
    running = True
    while running:
        began = time.perf_counter()
        running = not any(output.request_id == "prompt" and output.finish_reason for output in core.step())
        beside.append(time.perf_counter() - began)
    core.abort("stream")
    return {
        "alone_s": statistics.median(alone[2:]),
        "usual_s": statistics.median(beside),
        "longest_s": max(beside),
        "steps": len(beside),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--began", type=float, default=time.time(), help="when this process was started")
    parser.add_argument("--load-only", action="store_true")
    parser.add_argument("--details", action="store_true", help="also time outside the kernels, and a prompt's stall")
    parser.add_argument("--depths", help="decode after so many tokens, such as 1024,32768, and nothing else")
    options = parser.parse_args()
    depths = [int(depth) for depth in options.depths.split(",")] if options.depths else []
    core = engine(options.folder, options.threads, max(depths, default=CONTEXT))
    found: dict[str, Any] = {"load_s": time.time() - options.began}
    if depths:
        found["depths"] = {depth: depth_speed(core, depth) for depth in depths}
    elif not options.load_only:
        for pair in core.runner.cache:  # type: ignore[attr-defined]
            for cache in pair:
                cache.zero_()  # all of it is in memory, as after a text of that length
        steps(core, 1, 16, 32)  # the first steps bring code, buffers and mapped pages into memory
        found["decode_1"] = decode_speed(core, 1, 64)
        found["prefill_512"] = prefill_speed(core, 512)
        found["decode_16"] = decode_speed(core, 16, 17)
        if options.details:
            found["outside_kernels"] = round(share_outside(core), 4)
            found["stall"] = stall(core, 2000)
        model = core.runner.model  # type: ignore[attr-defined]  # a real runner, not only what the engine needs of one
        found["experts_per_layer"] = round(experts_reached(model, partial(steps, core, 16, 16, 3)), 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
