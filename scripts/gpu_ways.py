"""The kernels of one row in several sizes of program, each timed by itself: what their constants are chosen from.

The launches of a graph read matrices of their own, so that the L2 cache does not serve them.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_kernels import normal, rounded
from gpu_machine import Machine, Report

from ernie_serve.kernels.triton import experts, experts_of_one, one_row
from ernie_serve.model.config import ModelConfig

REPEATS, REPLAYS = 8, 4
Launch = Callable[[int], object]


def measure_ways(report: Report, machine: Machine) -> None:
    """Microseconds and TB/s of each way; the first of each kernel is how it is now."""
    c = ModelConfig.from_dict(machine.values, source="gpu_check")
    report.values["ways"] = []
    for format in ("plain", "fp8" if machine.reads_fp8 else "int8"):
        for kernel, launch, moved in kernels(machine, c, format):
            for way in ways(kernel, machine.dry):
                found = {"kernel": kernel, "format": format} | way
                try:
                    with as_told(way):
                        us = microseconds(machine, launch)
                except Exception as error:  # a size that does not divide, or more registers than there are
                    report.values["ways"].append(found | {"error": f"{type(error).__name__}: {str(error)[:100]}"})
                    continue
                report.values["ways"].append(found | {"us": round(us, 2), "tb_s": round(moved / us / 1e6, 2)})
                print(f"   {report.values['ways'][-1]}", flush=True)


def ways(kernel: str, is_short: bool) -> list[dict[str, Any]]:
    """Constants to try, those of now first; a score has a program of its own in any case."""
    if kernel == "down":
        now = {"_WAYS": experts_of_one._WAYS}
        every = itertools.product((4, 8, 16), (256, 512), (2, 4, 8))
        tried: Iterator[dict[str, Any]] = ({"_WAYS": dict.fromkeys(now["_WAYS"], way)} for way in every)
    elif kernel == "scores":
        now = {"_WARPS": one_row._WARPS}
        tried = ({"_WARPS": warps} for warps in (1, 2, 4, 8))
    else:
        now = {"_ROWS": one_row._ROWS, "_WARPS": one_row._WARPS}
        tried = (dict(zip(now, each, strict=True)) for each in itertools.product((2, 4, 8, 16), (2, 4, 8)))
    return [now, *([] if is_short else (each for each in tried if each != now))]


@contextmanager
def as_told(way: dict[str, Any]) -> Iterator[None]:
    """The constants of the kernels' modules, for a while."""
    module = experts_of_one if "_WAYS" in way else one_row
    before = {name: getattr(module, name) for name in way}
    try:
        for name, value in way.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def kernels(machine: Machine, c: ModelConfig, format: str) -> list[tuple[str, Launch, int]]:
    """Name, launch and bytes of each kernel; a launch takes the matrix of that number."""
    repeats, _ = counts(machine)
    N, H, K, D = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    stream, norm, heads = normal(machine, 1, N), normal(machine, N), normal(machine, 1, H * D)
    cache = torch.zeros(1, 64, K, D, dtype=machine.dtype, device=machine.device)
    rotary, slot = (
        torch.rand(1, D // 2, 2, device=machine.device),
        torch.zeros(1, dtype=torch.int64, device=machine.device),
    )

    def matrices(*shape: int) -> list[Any]:
        made = (normal(machine, *shape, scale=shape[-1] ** -0.5) for _ in range(repeats))
        return [each if format == "plain" else rounded(each, format) for each in made]

    qkv, o = matrices((H + 2 * K) * D, N), matrices(N, H * D)
    router = [torch.randn(c.moe_num_experts, N, device=machine.device) for _ in range(repeats)]
    E, A, width = c.moe_num_experts, c.moe_k, c.moe_intermediate_size
    down = rounded(normal(machine, E, N, width), format) if format != "plain" else normal(machine, E, N, width)
    picks = [torch.rand(1, E, device=machine.device).topk(A).indices.int() for _ in range(repeats)]
    chances = torch.rand(1, A, device=machine.device).to(machine.dtype)
    sizes = experts.sizes_of(1, A, down, None, stream)
    hidden = torch.randn(A, width, device=machine.device).to(torch.float16 if sizes["HALF"] else machine.dtype)
    each = 2 if format == "plain" else 1
    found: list[tuple[str, Launch, int]] = [
        (
            "qkv",
            lambda i: one_row.linear_and_turn(stream, qkv[i], norm, 1e-5, rotary, cache, cache, slot, H),
            (H + 2 * K) * D * N * each,
        ),
        ("o", lambda i: one_row.add_linear(stream, heads, o[i]), N * H * D * each),
        (
            "down",
            lambda i: experts_of_one.sum_down(hidden, chances, picks[i], down, None, sizes, stream),
            A * N * width * each,
        ),
    ]
    if format == "plain":  # the router's weights have one form
        found.append(("scores", lambda i: one_row.scores(stream, router[i], norm, 1e-5, machine.dtype), 4 * E * N))
    return found


def counts(machine: Machine) -> tuple[int, int]:
    """Launches of a graph, and how often it is replayed in one measurement."""
    return (2, 1) if machine.dry else (REPEATS, REPLAYS)


def microseconds(machine: Machine, launch: Launch) -> float:
    """Of one launch: the median of replays of a graph of them, or of runs where there is none."""
    repeats, replays = counts(machine)

    def run() -> None:
        for which in range(repeats):
            launch(which)

    run()
    replay: Callable[[], object] = run
    if not machine.dry:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    found = sorted(machine.seconds(lambda: [replay() for _ in range(replays)]) for _ in range(1 if machine.dry else 7))
    return 1e6 * found[len(found) // 2] / replays / repeats
