"""Our engine beside transformers' `generate`: the same weights, in one process, measured in turns.

A reduced 21B geometry (full widths, few layers) is made in memory; both models are made of the same tensors, which
ours then packs where its kernels have a better order. Prints medians, spread and ratios, and how many experts a
layer the prompts reached.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cpu_engine import experts_reached
from rich.console import Console
from rich.table import Table
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from ernie_serve.engine.core import EngineCore
from ernie_serve.engine.kv_cache import BlockPool
from ernie_serve.engine.scheduler import Scheduler
from ernie_serve.kernels.fused import cpu_kernels_for
from ernie_serve.messages import EngineRequest, SamplingParams
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.packing import pack
from ernie_serve.model.random_checkpoint import GEOMETRIES
from ernie_serve.worker.runner import Runner

BLOCK = 16


def random_model(layers: int, dtype: torch.dtype) -> Ernie:
    """Our model with random weights; router rows scaled so that routing spreads."""
    values = {**GEOMETRIES["21b"], "num_hidden_layers": layers, "moe_layer_end_index": layers - 1}
    config = ModelConfig.from_dict(values, source="21b")
    with torch.device("meta"):
        model = Ernie(config, cpu_kernels_for(dtype), dtype)
    model.to_empty(device="cpu")
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
        flat = parameter.data.view(-1)
        if name.endswith("norm.weight"):
            flat.fill_(1.0)
            continue
        scale = 1e-3 if name.endswith("correction_bias") else parameter.shape[-1] ** -0.5
        start = (index * 7919 * 64) % (len(pool) // 2)
        for begin in range(0, len(flat), len(pool) // 2):
            piece = flat[begin : begin + len(pool) // 2]
            piece.copy_(pool[start : start + len(piece)]).mul_(scale)
    return model


def as_transformers(ours: Ernie) -> Ernie4_5_MoeForCausalLM:
    """The reference implementation over the very tensors of ours."""
    c = ours.config
    config = Ernie4_5_MoeConfig(
        **{k: v for k, v in GEOMETRIES["21b"].items() if k not in ("architectures", "model_type", "torch_dtype")}
        | {"num_hidden_layers": c.num_hidden_layers, "moe_layer_end_index": c.num_hidden_layers - 1}
    )
    with torch.device("meta"):
        theirs = Ernie4_5_MoeForCausalLM(config)
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    state: dict[str, torch.Tensor] = {}
    for name, tensor in ours.named_parameters():
        tensor = tensor.data
        match name.split("."):
            case [*front, "qkv_proj", "weight"]:
                for part, piece in zip("qkv", tensor.split([H * D, K * D, K * D]), strict=True):
                    state[".".join([*front, f"{part}_proj.weight"])] = piece
            case [*front, "gate_up_proj", "weight"]:
                front = [*front[:-1], "shared_experts"] if front[-1] == "shared" else front
                for part, piece in zip(("gate", "up"), tensor.chunk(2), strict=True):
                    state[".".join([*front, f"{part}_proj.weight"])] = piece
            case [*front, "shared", "down_proj", "weight"]:
                state[".".join([*front, "shared_experts.down_proj.weight"])] = tensor
            case [*front, "router", "weight"]:
                state[".".join([*front, "gate.weight"])] = tensor
            case [*front, "router", "correction_bias"]:
                state[".".join([*front, "gate.moe_statics.e_score_correction_bias"])] = tensor[None]
            case [*front, "experts", ("gate_up" | "down") as part]:
                state[".".join([*front, "experts", f"{part}_proj"])] = tensor
            case _:
                state[name] = tensor
    state = {f"model.{name}": torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False, assign=True)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config=config)
    return theirs.eval()


class Ours:
    """The whole engine, stepped in this thread: scheduler, paged cache, runner, sampler."""

    def __init__(self, model: Ernie, streams: int, length: int) -> None:
        blocks = streams * (-(-length // BLOCK) + 1)
        pool = BlockPool(blocks, BLOCK, enable_prefix_caching=False)
        scheduler = Scheduler(pool, max_num_seqs=streams, max_num_batched_tokens=2048, max_model_len=length + 1)
        self.core = EngineCore(scheduler, Runner(model, blocks, BLOCK, max_num_seqs=streams))

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        texts: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
        sampling = SamplingParams(max_tokens=new, seed=0, temperature=0.0)
        for name, prompt in zip(texts, prompts, strict=True):
            self.core.add(EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling))
        while self.core.has_work:
            for output in self.core.step():
                texts[output.request_id] += output.token_ids
        return list(texts.values())


def theirs_generate(model: Ernie4_5_MoeForCausalLM, prompts: list[list[int]], new: int) -> list[list[int]]:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    return out[:, ids.shape[1] :].tolist()


def measure(name: str, layers: int, counts: list[int], input_len: int, new: int, repeats: int) -> list[dict[str, Any]]:
    """Both models in turns, at every count of streams."""
    model = random_model(layers, getattr(torch, name))
    reference = as_transformers(model)
    pack(model)
    rows = []
    for streams in counts:
        chance = torch.Generator().manual_seed(streams)
        prompts = torch.randint(5, 100_000, (streams, input_len), generator=chance).tolist()
        ours = Ours(model, streams, input_len + new)
        sides = (partial(ours.generate, prompts), partial(theirs_generate, reference, prompts))
        same = sum(a == b for a, b in zip(*(side(4) for side in sides), strict=True))
        reached = experts_reached(model, partial(ours.generate, prompts, 3))
        Console().print(f"{name}, {streams} streams: {same} of {streams} begin with the same 4 greedy tokens")
        turns = [([timed(side, 1) for side in sides], [timed(side, new) for side in sides]) for _ in range(repeats)]
        parts = {
            "prefill": [[streams * input_len / first[i] for first, _ in turns] for i in (0, 1)],
            "decode": [[streams * (new - 1) / (whole[i] - first[i]) for first, whole in turns] for i in (0, 1)],
            "whole": [[streams * new / whole[i] for _, whole in turns] for i in (0, 1)],
        }
        for part, (mine, other) in parts.items():
            ratios = sorted(a / b for a, b in zip(mine, other, strict=True))
            rows.append(
                {
                    "dtype": name,
                    "streams": streams,
                    "part": part,
                    "ours_tok_s": round(statistics.median(mine), 2),
                    "transformers_tok_s": round(statistics.median(other), 2),
                    "ratio": round(statistics.median(ratios), 2),
                    "spread": [round(ratios[0], 2), round(ratios[-1], 2)],
                    "same_tokens": same,
                    "experts_per_layer": round(reached, 1),
                }
            )
    return rows


def timed(generate: Callable[[int], Any], new: int) -> float:
    began = time.perf_counter()
    generate(new)
    return time.perf_counter() - began


def report(points: list[dict[str, Any]], output: Path | None, **facts: Any) -> None:
    """Print the points, a row each; write them with the facts, where `output` says so."""
    table = Table(box=None, header_style="bold")
    for heading in points[0]:
        table.add_column(heading.replace("_", " "), justify="right")
    for point in points:
        table.add_row(*(str(value) for value in point.values()))
    Console().print(table)
    if output:
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        found = {"commit": commit, "machine": platform.platform(), **facts, "points": points}
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", choices=["transformers"], default="transformers")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--streams", default="1,16")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    counts = [int(count) for count in options.streams.split(",")]
    rows = [
        row
        for name in options.dtypes.split(",")
        for row in measure(name, options.layers, counts, options.input_len, options.output_len, options.repeats)
    ]
    report(
        rows,
        options.output_json,
        threads=options.threads,
        versions={name: version(name) for name in ("torch", "transformers")},
        layers=options.layers,
        input_len=options.input_len,
        output_len=options.output_len,
    )


if __name__ == "__main__":
    main()
