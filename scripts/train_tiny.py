"""Trains the bundled model `ernie-tiny` from nothing: its data, its tokenizer, its weights.

Run it again after a kill and it goes on where it last saved; give it more minutes and it trains longer.
"""

import json
import multiprocessing
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tiny import checkpoint, tokens
from tiny.batches import SOURCES, Batches
from tiny.network import TinyConfig
from tiny.trainer import Counter, Team, Trainer
from tiny.words import Words
from tokenizers import Tokenizer

BUNDLED = Path(__file__).parent.parent / "ernie_serve" / "bundled" / "ernie-tiny"
QUIET_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
"""Keeps freed memory in the process: without it, page faults take a tenth of the time."""
STOPS = ["</s>", "<|im_end|>"]


def main(
    minutes: Annotated[float, typer.Option(help="Training time in all, pauses and earlier runs included.")] = 180.0,
    work: Annotated[Path, typer.Option(help="Where the state is kept between runs.")] = Path("build/ernie-tiny"),
    out: Annotated[Path, typer.Option(help="Where the model is exported to.")] = BUNDLED,
    seed: int = 45,
    processes: Annotated[int, typer.Option(help="Processes of one thread each that share every step.")] = 2,
    save_minutes: Annotated[float, typer.Option(help="Training time between two saved states.")] = 3.0,
    quiet: Annotated[bool, typer.Option(help="A line now and then instead of a bar.")] = False,
) -> None:
    """Train `ernie-tiny` and export it."""
    if not QUIET_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **QUIET_MEMORY, "OMP_NUM_THREADS": "1"})  # noqa: S606  # itself
    make_tokenizer(out, seed)
    work.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    claimed = context.Value("q", 0)
    with tempfile.TemporaryDirectory() as meeting:
        job = Job(minutes, work, out, seed, processes, save_minutes, quiet, f"file://{meeting}/point")
        others = [context.Process(target=train, args=(job, rank, claimed), daemon=True) for rank in range(1, processes)]
        for other in others:
            other.start()
        train(job, 0, claimed)


@dataclass(frozen=True)
class Job:
    """What every process is told."""

    minutes: float
    work: Path
    out: Path
    seed: int
    processes: int
    save_minutes: float
    quiet: bool
    meeting: str


def train(job: Job, rank: int, claimed: Counter) -> None:
    """The life of one process; the first one shows, saves and exports."""
    torch.set_num_threads(1)
    if job.processes > 1:
        forever = timedelta(days=2)  # a paused process is waited for
        dist.init_process_group("gloo", init_method=job.meeting, rank=rank, world_size=job.processes, timeout=forever)
    tokenizer = Tokenizer.from_file(str(job.out / "tokenizer.json"))
    config = TinyConfig(vocab_size=tokenizer.get_vocab_size())
    batches = Batches(tokenizer, job.seed, tokens=8192, micro_tokens=2048, longest=1024, prompt_share=0.08)
    team = Team(job.processes, claimed if job.processes > 1 else None, rank)
    trainer = Trainer(config, batches, job.seed, team)
    if saved := checkpoint.load_state(job.work):
        trainer.load(*saved)
        print(f"process {rank} resumes at step {trainer.number}, after {trainer.seconds / 60:.1f} minutes", flush=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=job.quiet or rank > 0) as bar:
        task = bar.add_task("starting", total=1.0)
        saved_at = trainer.seconds
        while (progress := agreed(trainer.seconds / (job.minutes * 60), job.processes)) < 1.0:
            report = trainer.step(progress)
            speed = report.tokens / report.seconds
            line = f"step {trainer.number}  loss {report.loss:.3f}  ahead {report.mtp_loss:.3f}  {speed:,.0f} tok/s"
            bar.update(task, completed=progress, description=line)
            if job.quiet and rank == 0 and trainer.number % 20 == 0:
                print(f"{line}  norm {report.norm:.2f}  busiest {report.busiest:.2f}  {progress:.1%}", flush=True)
            if rank == 0 and trainer.seconds - saved_at >= job.save_minutes * 60:
                checkpoint.save_state(job.work, *trainer.state())
                checkpoint.export(
                    job.work / "export", trainer.network.published(), config.published(), stop_ids(tokenizer)
                )
                saved_at = trainer.seconds
    if rank == 0:
        checkpoint.save_state(job.work, *trainer.state())
        checkpoint.export(job.out, trainer.network.published(), config.published(), stop_ids(tokenizer))
        print(
            f"{trainer.number} steps, {trainer.tokens:,} tokens, {trainer.seconds / 60:.1f} minutes; now in {job.out}"
        )
    if job.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def agreed(progress: float, processes: int) -> float:
    """The first process's clock is everybody's."""
    if processes == 1:
        return progress
    told = torch.tensor([progress], dtype=torch.float64)
    dist.broadcast(told, src=0)
    return float(told)


def make_tokenizer(out: Path, seed: int) -> Tokenizer:
    """Read the tokenizer, or make it from documents of its own."""
    path = out / "tokenizer.json"
    if not path.exists():
        words = Words(random.Random(seed))
        texts = [
            "".join(text for text, _ in pieces)
            for source in SOURCES
            for _ in range(1500)
            for pieces in source.draw(words)
        ]
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.replace_text(path, tokens.as_text(tokens.build(texts, pieces=1350, spaced=380)))
        checkpoint.replace_text(out / "tokenizer_config.json", json.dumps(tokens.CONFIG, indent=2) + "\n")
    return Tokenizer.from_file(str(path))


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text."""
    return [tokenizer.token_to_id(piece) for piece in STOPS]


if __name__ == "__main__":
    typer.run(main)
