"""The verb `quantize`: from a checkpoint to its quantized form, and a report of what that costs.

Knows which rooms it needs and how to show their figures. Rounds nothing and writes nothing itself.
"""

import signal
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ernie_serve.config import path_of
from ernie_serve.model import hub
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.forms import quantizer
from ernie_serve.model.loading import load
from ernie_serve.model.quantize import model_bytes, shapes_of
from ernie_serve.model.quantize_folder import kernels_of, quantize_folder
from ernie_serve.model.quantize_report import LogitError, MatrixError, Measured, logit_errors
from ernie_serve.model.recipes import DeviceKind, Quantization, Recipe
from ernie_serve.text.tokenizer import Tokenizer
from ernie_serve.worker import memory
from ernie_serve.worker.cores import usable_cores

CPU = torch.device("cpu")


def quantize(
    source: str,
    folder: Path,
    recipe: Recipe,
    device: DeviceKind = "cpu",
    *,
    revision: str | None,
    threads: int | None,
    report_tokens: int,
) -> None:
    """Write `folder` from a checkpoint, for a CPU or a GPU, which need not be there; with tokens for a report, compare
    the two afterwards. Raises `StartupError`."""
    quantization = Quantization.of(recipe, device)
    signal.signal(signal.SIGTERM, _end)  # what is half written goes with us
    torch.set_num_threads(threads or usable_cores())
    console = Console(stderr=True, highlight=False)
    folder = path_of("OUT", str(folder))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)

        def show_done(done: float, what: str) -> None:
            bar.update(task, completed=done, description=what)

        original = hub.resolve(source, revision, "all", show_done)
        measured = Measured(quantizer(kernels_of(quantization), CPU)) if report_tokens else None
        num_bytes = quantize_folder(original, folder, quantization, show_done, quantize=measured)
    console.print(
        f"{folder}: {recipe}, {size(num_bytes)} of weights. Serve it with: ernie-serve serve {folder}"
        + (" --device cuda" if device == "cuda" else ""),
        soft_wrap=True,
    )
    if measured:
        show = Console(highlight=False).print
        show(matrix_table(measured.errors))
        logits = compare(original, folder, report_tokens)
        show(logit_table(logits) if isinstance(logits, list) else logits)


def size(num_bytes: int) -> str:
    """Bytes as a person reads them: a small model has some too."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def compare(original: Path, folder: Path, num_tokens: int) -> list[LogitError] | str:
    """Distances of the two folders' predictions; text says why there are none."""
    plain, packed = ModelConfig.from_folder(original), ModelConfig.from_folder(folder)
    assert packed.quantization, "it was written so"
    with torch.device("meta"):
        kernels = kernels_of(packed.quantization)
        ours, theirs = (Ernie(config, kernels, torch.float32) for config in (packed, plain))
    needed = sum(model_bytes(shapes_of(each), each.config.quantization, torch.float32) for each in (ours, theirs))
    if needed > (free := memory.free_bytes(CPU)):
        return (
            f"Logits are not compared: both models together need {needed / memory.GIB:.1f} GiB in float32, and "
            f"{free / memory.GIB:.1f} GiB are free."
        )
    load(theirs, original, None, device=CPU)
    load(ours, folder, None, device=CPU)
    return logit_errors(theirs, ours, num_tokens, Tokenizer.from_folder(folder).vocab_size)


def matrix_table(errors: list[MatrixError]) -> Table:
    """Distances of matrices, a row a class."""
    table = Table(
        "matrices", "bits", "measured", "relative error", "by the largest alone", box=None, header_style="bold"
    )
    for each in errors:
        table.add_row(each.kind, str(each.bits), str(each.num_matrices), f"{each.written:.4f}", f"{each.plain:.4f}")
    return table


def logit_table(errors: list[LogitError]) -> Table:
    """Distances of predictions, a row a text."""
    table = Table("logits over", "tokens", "KL, mean", "KL, largest", "same top token", box=None, header_style="bold")
    for each in errors:
        table.add_row(
            each.what,
            str(each.num_tokens),
            f"{each.divergence:.5f}",
            f"{each.worst:.4f}",
            f"{100 * each.agreement:.1f} %",
        )
    return table


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
