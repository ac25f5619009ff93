"""What constraints cost in a decode step: the same engine with and without a JSON schema, stepped in turns.

A reduced 21B geometry (full widths and vocabulary, few layers) is made in memory. Two engines share its weights and
take turns step by step, so that whatever else the machine does meets both. What is told is the median of the
differences within a turn, its share of a step, and the share that it would have of a step with all 28 layers: the
measured step and the measured time of its last layer for each layer that is missing, which is arithmetic.

`--clock cpu` counts the processor time of all threads instead, which other work on the machine disturbs less. It
counts the making of masks in full, though that runs beside the network.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from against_transformers import BLOCK, random_model, report
from rich.console import Console

from ernie_serve.engine.core import EngineCore
from ernie_serve.engine.kv_cache import BlockPool
from ernie_serve.engine.scheduler import Scheduler
from ernie_serve.grammar.compiler import GrammarCompiler, Vocabulary
from ernie_serve.messages import EngineRequest, Grammar, SamplingParams
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.packing import pack
from ernie_serve.model.random_tokenizer import random_tokenizer
from ernie_serve.text.tokenizer import Tokenizer
from ernie_serve.worker.runner import Runner

Clock = Callable[[], float]

ALL_LAYERS = 28
INPUT_LEN = 32
SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 100,  # more than any run makes, so that nobody ends early
    "items": {
        "type": "object",
        "required": ["name", "kind", "price", "tags", "maker"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "kind": {"enum": ["book", "tool", "toy"]},
            "price": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
            "maker": {"type": "object", "properties": {"city": {"type": "string"}, "since": {"type": "integer"}}},
        },
    },
}


class Side:
    """One of the two engines, its requests all in the middle of their answers."""

    def __init__(
        self,
        model: Ernie,
        grammars: GrammarCompiler,
        streams: int,
        *,
        steps: int,
        temperature: float,
        grammar: Grammar | None,
        clock: Clock,
    ) -> None:
        self._clock = clock
        length = INPUT_LEN + steps + 2
        blocks = streams * (-(-length // BLOCK) + 1)
        pool = BlockPool(blocks, BLOCK, enable_prefix_caching=False)
        scheduler = Scheduler(pool, max_num_seqs=streams, max_num_batched_tokens=2048, max_model_len=length)
        runner = Runner(model, blocks, BLOCK, max_num_seqs=streams, num_valid_ids=grammars.vocabulary.size)
        self.core = EngineCore(scheduler, runner, grammars)
        self.streams = streams
        chance = torch.Generator().manual_seed(streams)
        for index, prompt in enumerate(torch.randint(5, 100_000, (streams, INPUT_LEN), generator=chance).tolist()):
            sampling = SamplingParams(max_tokens=steps + 1, seed=index, temperature=temperature, grammar=grammar)
            self.core.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
        while len(self.core.step()) < streams:
            pass  # the prompts, and the grammars as far as they are compiled while others wait

    def step(self) -> float:
        """Seconds of one step, in which every request gets a token."""
        began = self._clock()
        outputs = self.core.step()
        taken = self._clock() - began
        assert len(outputs) == self.streams, "every request is decoding"
        assert not any(output.error for output in outputs), outputs
        return taken


class LastLayer:
    """How long the last layer takes, each time."""

    def __init__(self, model: Ernie, clock: Clock) -> None:
        self.seconds: list[float] = []
        layer = model.layers[-1]

        class Timed(type(layer)):  # type: ignore[misc]  # a class that is known when it runs
            def forward(itself, *inputs: Any) -> Any:
                began = clock()
                outputs = super().forward(*inputs)
                self.seconds.append(clock() - began)
                return outputs

        layer.__class__ = Timed


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every count of streams and every temperature, over one model."""
    model = random_model(options.layers, getattr(torch, name))
    grammars = GrammarCompiler(Vocabulary.of(Tokenizer(random_tokenizer(model.config.vocab_size))))
    clock: Clock = time.process_time if options.clock == "cpu" else time.perf_counter
    pack(model)
    last = LastLayer(model, clock)
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    points = []
    for streams in map(int, options.streams.split(",")):
        for temperature in map(float, options.temperatures.split(",")):
            free, bound = (
                Side(
                    model,
                    grammars,
                    streams,
                    steps=options.steps,
                    temperature=temperature,
                    grammar=each,
                    clock=clock,
                )
                for each in (None, grammar)
            )
            free.step(), bound.step()
            last.seconds.clear()
            turns = [(free.step(), bound.step()) for _ in range(options.steps - 2)]
            added = sorted(b - a for a, b in turns)
            step, layer = statistics.median(a for a, _ in turns), statistics.median(last.seconds)
            whole = step + (ALL_LAYERS - options.layers) * layer
            middle = statistics.median(added)
            points.append(
                {
                    "dtype": name,
                    "streams": streams,
                    "temperature": temperature,
                    "step_ms": round(1e3 * step, 2),
                    "added_ms": round(1e3 * middle, 2),
                    "added_quartiles_ms": [round(1e3 * q, 2) for q in statistics.quantiles(added, n=4)[::2]],
                    "share_percent": round(100 * middle / step, 2),
                    "predicted_28_layers_ms": round(1e3 * whole, 1),
                    "predicted_share_percent": round(100 * middle / whole, 2),
                }
            )
            Console().print(points[-1])
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--masks", action="store_true", help="this measurement; what scripts/bench looks for")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    points = [point for name in options.dtypes.split(",") for point in measure(name, options)]
    report(
        points,
        options.output_json,
        threads=options.threads,
        clock=options.clock,
        torch=torch.__version__,
        layers=options.layers,
        input_len=INPUT_LEN,
        steps=options.steps,
    )


if __name__ == "__main__":
    main()
