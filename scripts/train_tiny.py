"""Trains the bundled model `ernie-tiny` from nothing: its data, its tokenizer, its weights.

Run it again after a kill and it goes on where it last saved; give it more minutes and it trains longer.
"""

import json
import os
import random
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tiny import checkpoint, tokens
from tiny.batches import SOURCES, Batches
from tiny.network import TinyConfig
from tiny.trainer import Trainer
from tiny.words import Words
from tokenizers import Tokenizer

BUNDLED = Path(__file__).parent.parent / "ernie_serve" / "bundled" / "ernie-tiny"
STOPS = ["</s>", "<|im_end|>"]


def main(
    minutes: Annotated[float, typer.Option(help="Training time in all, pauses and earlier runs included.")] = 170.0,
    work: Annotated[Path, typer.Option(help="Where the state is kept between runs.")] = Path("build/ernie-tiny"),
    out: Annotated[Path, typer.Option(help="Where the model is exported to.")] = BUNDLED,
    seed: int = 45,
    threads: int = 2,
    save_minutes: Annotated[float, typer.Option(help="Training time between two saved states.")] = 3.0,
    quiet: Annotated[bool, typer.Option(help="A line now and then instead of a bar.")] = False,
) -> None:
    """Train `ernie-tiny` and export it."""
    torch.set_num_threads(threads)
    tokenizer = make_tokenizer(out, seed)
    config = TinyConfig(vocab_size=tokenizer.get_vocab_size())
    batches = Batches(tokenizer, seed, tokens=12288, micro_tokens=4096, longest=1024, prompt_share=0.08)
    trainer = Trainer(config, batches, seed)
    if saved := checkpoint.load_state(work):
        trainer.load(*saved)
        print(f"resuming at step {trainer.number}, after {trainer.seconds / 60:.1f} minutes")
    saved_at = trainer.seconds
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f}%"), TimeElapsedColumn())
    with Progress(*columns, disable=quiet) as bar:
        task = bar.add_task("starting", total=minutes * 60)
        while trainer.seconds < minutes * 60:
            report = trainer.step(trainer.seconds / (minutes * 60))
            line = f"step {trainer.number}  loss {report.loss:.3f}  ahead {report.mtp_loss:.3f}  {report.tokens / report.seconds:,.0f} tok/s"
            bar.update(task, completed=trainer.seconds, description=line)
            if quiet and trainer.number % 20 == 0:
                share = trainer.seconds / (minutes * 60)
                print(f"{line}  norm {report.norm:.2f}  busiest {report.busiest:.2f}  {share:.1%}", flush=True)
            if trainer.seconds - saved_at >= save_minutes * 60:
                checkpoint.save_state(work, *trainer.state())
                checkpoint.export(work / "export", trainer.network.published(), config.published(), stop_ids(tokenizer))
                saved_at = trainer.seconds
    checkpoint.save_state(work, *trainer.state())
    checkpoint.export(out, trainer.network.published(), config.published(), stop_ids(tokenizer))
    print(f"{trainer.number} steps, {trainer.tokens:,} tokens, {trainer.seconds / 60:.1f} minutes; exported to {out}")


def make_tokenizer(out: Path, seed: int) -> Tokenizer:
    """Read the tokenizer, or make it from documents of its own."""
    path = out / "tokenizer.json"
    if not path.exists():
        words = Words(random.Random(seed))
        texts = ["".join(text for text, _ in source.draw(words)) for source in SOURCES for _ in range(1500)]
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.replace_text(path, tokens.as_text(tokens.build(texts, pieces=1350, spaced=380)))
        checkpoint.replace_text(out / "tokenizer_config.json", json.dumps(tokens.CONFIG, indent=2) + "\n")
    return Tokenizer.from_file(str(path))


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text."""
    return [tokenizer.token_to_id(piece) for piece in STOPS]


if __name__ == "__main__":
    typer.run(main)
