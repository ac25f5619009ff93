"""Tries tiles of the expert kernels on the card at hand, and prints the fastest: what `tiles.py` is written from.

Each kernel is timed by itself, as a graph of launches for different tokens, so that the L2 cache does not serve it.
Most of the work is the compiler's, which other processes do first, into Triton's cache. On a card with less shared
memory than an H200's, tiles that do not fit are left out as they fail.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ernie_serve.kernels.quantized import Quantized, quantize
from ernie_serve.kernels.triton import align, experts
from ernie_serve.kernels.triton.tiles import Tile, tile_for

E, A, S, N, WIDTH = 64, 6, 2, 2560, 1536
BITS = {"plain": 16.0, "int8": 8.0, "fp8": 8.0, "int4": 4.25}
KERNELS: tuple[Literal["gate_up", "down"], ...] = ("gate_up", "down")
REPEATS = 8  # launches in a graph, each for tokens of its own
COLUMNS_AND_DEPTHS = ((32, 128), (64, 64), (64, 128), (32, 256), (16, 256), (16, 128), (128, 64), (128, 128), (64, 256))


def candidates(kernel: Literal["gate_up", "down"], tokens: int, format: str) -> list[Tile]:
    """The tile that is used now, and others that keep enough loads under way and no warp too busy."""
    matrices, number = 2 if kernel == "gate_up" else 1, 2 if format == "plain" else 1
    found = [tile_for(kernel, tokens, format if format in ("plain", "int4") else "row")]
    for rows in (16,) if tokens <= 64 else (32, 64) if tokens <= 512 else (64, 128):
        for (columns, depth), warps, stages in product(COLUMNS_AND_DEPTHS, (2, 4, 8), (3, 4, 5)):
            shared = (stages - 1) * depth * (rows * 2 + matrices * columns * number)
            a_warp = matrices * columns * depth * rows // 16 // warps
            if 24 << 10 <= shared <= 227 << 10 and 1024 <= a_warp <= 8192 and (format != "int4" or depth == 128):
                found.append(Tile(rows, columns, depth, warps, stages))
    return list(dict.fromkeys(found))


def make_weights(format: Any, all_alike: bool = False) -> list[Any]:
    """Stacks of gate and up, and of down, and the shared MLP's two; experts that are all one take little memory."""
    made: list[Any] = []
    for front, shape in (((E,), (2 * WIDTH, N)), ((E,), (N, WIDTH)), ((), (2 * S * WIDTH, N)), ((), (N, S * WIDTH))):
        drawn = () if all_alike else front
        matrix = torch.randn(*drawn, *shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5
        kept = matrix if format == "plain" else quantize(matrix, format)
        if front != drawn and isinstance(kept, Quantized):
            data, scales = (part.expand(*front, *part.shape) for part in (kept.data, kept.scales))
            made.append(Quantized(data, scales, kept.format))
        else:
            made.append(kept.expand(*front, *shape) if isinstance(kept, Tensor) else kept)
    return made


@contextmanager
def only(kernel: str, compiles: bool) -> Iterator[None]:
    """Launches of this kernel happen, or are compiled, and those of others do not."""
    run = JITFunction.run

    def chosen(function: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if function.fn.__name__ == f"_{kernel}":
            return run(function, *args, grid=grid, warmup=compiles, **options)
        return None

    JITFunction.run = chosen
    try:
        yield
    finally:
        JITFunction.run = run


class Tokens:
    """What the kernels are given for T tokens: several choices of experts, sorted once for each number of rows."""

    def __init__(self, count: int, format: str) -> None:
        self.x = torch.randn(count, N, device="cuda").to(torch.bfloat16 if format == "plain" else torch.float16)
        self.chances = torch.rand(count, A, device="cuda").bfloat16()
        self.picks = [torch.rand(count, E, device="cuda").topk(A).indices.int() for _ in range(REPEATS)]
        self.hit = sum(len(pick.unique()) for pick in self.picks) / REPEATS + S

    def launch(self, weights: list[Any], tile: Tile, which: int) -> None:
        gate_up, down, *shared = weights
        experts.experts(self.x, self.chances, self.picks[which], gate_up, down, tuple(shared), tiles=(tile, tile))


def compile_share(jobs: list[tuple[str, int]], share: int, shares: int) -> None:
    """Every so-many-th tile; one that does not compile is found again when it is timed."""
    for format, count in jobs:
        weights, tokens = make_weights(format, all_alike=True), Tokens(count, format)
        tiles = [(kernel, tile) for kernel in KERNELS for tile in candidates(kernel, count, format)]
        for kernel, tile in tiles[share::shares]:
            try:
                with only(kernel, compiles=True):
                    tokens.launch(weights, tile, 0)
            except Exception as error:
                print(f"   {format} {count} {kernel} {tile}: {type(error).__name__}", flush=True)


def microseconds(tokens: Tokens, weights: list[Any], kernel: str, tile: Tile) -> float:
    """Of one launch: the median of replays of a graph of them."""
    sort, turn = align.align, iter([align.align(pick, E, S, tile.rows) for pick in tokens.picks] * 2)
    try:
        align.align = lambda *_: next(turn)  # sorted before, since only one kernel is timed
        with only(kernel, compiles=False):
            tokens.launch(weights, tile, 0)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for which in range(REPEATS):
                    tokens.launch(weights, tile, which)
    finally:
        align.align = sort
    found = []
    for _ in range(6):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        found.append(1e3 * began.elapsed_time(ended) / REPEATS)
    return sorted(found[1:])[2]


def measure(jobs: list[tuple[str, int]], ends: float) -> list[dict[str, Any]]:
    """All tiles of all jobs, as far as time allows, the fastest of each printed."""
    found: list[dict[str, Any]] = []
    for format, count in jobs:
        weights, tokens = make_weights(format), Tokens(count, format)
        for kernel in KERNELS:
            moved = tokens.hit * N * WIDTH * (2 if kernel == "gate_up" else 1) * BITS[format] / 8
            timed: list[tuple[float, Tile]] = []
            for tile in candidates(kernel, count, format):
                if time.monotonic() > ends:
                    break
                try:
                    timed.append((microseconds(tokens, weights, kernel, tile), tile))
                except Exception as error:
                    print(f"   {format} {count} {kernel} {tile}: {type(error).__name__}", flush=True)
            now = timed[0][0] if timed else 0.0
            for us, tile in sorted(timed, key=lambda each: each[0])[:4]:
                speed = f"{us:7.1f} us {moved / us / 1e6:5.2f} TB/s"
                print(f"{format:5} T={count:<4} {kernel:8} {speed}  {tile}  (now {now:.1f})", flush=True)
            found += [
                {"format": format, "tokens": count, "kernel": kernel, "us": round(us, 2), "tile": str(tile)}
                for us, tile in timed
            ]
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--formats", nargs="+", choices=list(BITS), default=list(BITS))
    options.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 256])
    options.add_argument("--minutes", type=float, default=4.0, help="how long the run may take")
    options.add_argument("--out", type=Path, help="a JSON of all that was timed")
    options.add_argument("--share", nargs=2, type=int, help=argparse.SUPPRESS)
    given = options.parse_args()
    jobs = list(product(given.formats, given.tokens))
    if given.share:
        return compile_share(jobs, *given.share)
    began, shares = time.monotonic(), max(1, (os.cpu_count() or 2) - 1)
    same = [sys.executable, __file__, "--formats", *given.formats, "--tokens", *map(str, given.tokens)]
    processes = [subprocess.Popen([*same, "--share", str(i), str(shares)]) for i in range(shares)]
    for process in processes:
        process.wait()
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    found = measure(jobs, began + 60 * given.minutes)
    if given.out:
        given.out.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "tiles": found}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
