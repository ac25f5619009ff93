"""The verb `doctor`: whether this machine can serve a checkpoint, how fast to expect it, and what to change.

Knows this machine by asking it, and a checkpoint by its `config.json`. Loads nothing and serves nothing. What it says
of speed is a prediction, from how fast this machine reads its memory and how many bytes a token reads.
"""

import os
import platform
import shutil
import time
from pathlib import Path

import torch
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table

from ernie_serve.config import Settings
from ernie_serve.errors import StartupError
from ernie_serve.kernels.native import ADVICE, tools
from ernie_serve.model import hub
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.loading import require_fp8
from ernie_serve.model.quantize import loading_bytes, parameter_shapes
from ernie_serve.model.random_checkpoint import GEOMETRIES
from ernie_serve.model.recipes import RECIPES, Quantization
from ernie_serve.worker import memory
from ernie_serve.worker.card import Card, card_of, device_of, take
from ernie_serve.worker.cores import threads_for
from ernie_serve.worker.fitting import CONTEXT, Form, forms_of

DEFAULT = "baidu/ERNIE-4.5-21B-A3B-PT"
PROBE_SECONDS = 5.0
_REACHED = (0.7, 0.95)  # of the memory's speed, by decoding on a CPU
_LAYER_SECONDS = 0.0003  # what a layer takes at least in a decode step on a CPU, however little it reads
_REACHED_BY_GPU = (0.5, 0.8)  # predicted, by one GPU
_CPU = torch.device("cpu")


def examine(model: str, *, revision: str | None, threads: int | None, device: str = "auto") -> None:
    """Look at the machine and the checkpoint, and print what was found, of its GPU where it has one.

    Raises `StartupError` for a wrong name.
    """
    console = Console(highlight=False)
    found = device_of(device)
    if found.type == "cuda":
        return _examine_gpu(console, model or DEFAULT, config_of(model or DEFAULT, revision), found)
    config = config_of(model or DEFAULT, revision)
    forms = forms_of(config)
    cores = threads or threads_for(forms[0].weight_bytes)
    torch.set_num_threads(cores)
    total, free = memory.total_bytes(), memory.free_bytes(_CPU)
    at_work, _, _ = os.getloadavg()  # before this adds to it
    console.print(f"Reading memory for {PROBE_SECONDS:.0f} seconds …", end="\r" if console.is_terminal else "\n")
    speed = memory_speed(PROBE_SECONDS, min(1 << 30, free // 4))
    disk = shutil.disk_usage(existing(Path(constants.HF_HUB_CACHE))).free
    compiler, ninja = tools().values()
    facts = Table.grid(padding=(0, 2))
    for name, value in {
        "Cores": f"{cores} used of {os.cpu_count()}; instructions: {', '.join(instructions()) or 'none that help'}",
        "Memory": f"{total / memory.GIB:.1f} GiB, {free / memory.GIB:.1f} free; read at {speed / 1e9:.1f} GB/s",
        "Disk": f"{disk / 1e9:.0f} GB free in {constants.HF_HUB_CACHE}",
        "PyTorch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "Compiler": f"{compiler or 'none'}; ninja: {ninja or 'none'}",
    }.items():
        facts.add_row(f"[bold]{name}[/]", value)
    console.print(facts)
    console.print(f"\n{model or DEFAULT}, {CONTEXT:,} tokens of context:")
    console.print(table(forms, free, speed, config.num_hidden_layers))
    for line in advice(
        forms,
        config,
        free=free,
        total=total,
        disk=disk,
        speed=speed,
        compiler=bool(compiler and ninja),
    ):
        console.print(f"- {line}", soft_wrap=True)
    if disturbance := disturbed_by(at_work, os.cpu_count() or 1):
        console.print(f"- {disturbance}", soft_wrap=True)
    return None


def disturbed_by(at_work: float, cores: int) -> str:
    """What is said of figures that were measured beside so many programs at work; nothing where they are few."""
    if at_work < cores / 4:
        return ""
    told = f"Other programs are at work here (a load of {at_work:.1f} on {cores} cores)"
    return f"{told}: alone, memory is read faster than was measured just now."


def _examine_gpu(console: Console, model: str, config: ModelConfig, device: torch.device) -> None:
    """Look at a GPU, and say of it what is said of a CPU.

    Raises `SettingsError` where the checkpoint's own numbers are of a kind that this GPU does not read.
    """
    take(device)
    card = card_of(device, PROBE_SECONDS)
    forms = [form for form in forms_of(config, device) if form.name != "fp8" or card.reads_fp8]
    for line in card_lines(card):
        console.print(line, soft_wrap=True)
    if card.has_kernels:
        require_fp8(config.quantization, torch.bfloat16, card.capability)
    console.print(f"\n{model}, {CONTEXT:,} tokens of context:")
    console.print(gpu_table(forms, card))
    console.print(f"- {gpu_advice(forms, config, card)}", soft_wrap=True)


def card_lines(card: Card) -> list[str]:
    """What a GPU is."""
    speed = f"{card.bytes_per_second / 1e9:,.0f} GB/s" if card.bytes_per_second else "unknown speed"
    source = "measured" if card.is_measured else "by its clock, not measured"
    major, minor = card.capability
    return [
        f"[bold]GPU[/]     {card.name}, compute capability {major}.{minor}"
        + ("" if card.reads_fp8 else "; no fp8, which needs 8.9" if card.has_kernels else "; the kernels need 8.0"),
        f"[bold]Memory[/]  {card.total_bytes / memory.GIB:.1f} GiB, {card.free_bytes / memory.GIB:.1f} free; read at "
        f"{speed}, {source}",
    ]


def gpu_table(forms: list[Form], card: Card) -> Table:
    """A row a form: memory, whether it is there, the room that is left, and the speeds to expect of this GPU."""
    shown = Table("weights", "memory needed", "fits", "tokens a second, one stream, predicted", box=None)
    shown.add_column("64 streams")
    shown.header_style = "bold"
    for form in forms:
        one, many = (
            " - ".join(f"{share * streams * card.bytes_per_second / read:,.0f}" for share in _REACHED_BY_GPU)
            if card.bytes_per_second
            else "?"
            for streams, read in ((1, form.token_bytes), (64, form.many_bytes))
        )
        fits = "yes" if form.needed_bytes <= _usable_bytes(card) else "no"
        shown.add_row(form.name, f"{form.needed_bytes / memory.GIB:.1f} GiB", fits, one, many)
    return shown


def _usable_bytes(card: Card) -> int:
    """What a server with the settings' defaults may use."""
    return card.usable_bytes(Settings().gpu_memory_utilization)


def gpu_advice(forms: list[Form], config: ModelConfig, card: Card) -> str:
    """What to serve on a GPU: the least rounded weights that fit, or why none do."""
    if not card.has_kernels:
        return "It cannot be served on this GPU: use another one, or --device cpu."
    fitting = [form for form in forms if form.needed_bytes <= _usable_bytes(card)]
    smallest = min(forms, key=lambda form: form.needed_bytes)
    free = (
        f"{card.free_bytes / memory.GIB:.1f} GiB are free of {card.total_bytes / memory.GIB:.1f}, of which "
        f"{(card.free_bytes - _usable_bytes(card)) / memory.GIB:.1f} are kept free (--gpu-memory-utilization)"
    )
    if not fitting:
        return (
            f"It does not fit: {smallest.name} needs {smallest.needed_bytes / memory.GIB:.1f} GiB and {free}. End what "
            "else uses the GPU, or use a smaller checkpoint or a larger GPU."
        )
    names = [form.name for form in fitting]
    if config.quantization is not None or names == [forms[0].name]:
        return "It can be served as it is."
    if names[0] == forms[0].name:
        return f"It can be served as it is; with --quantization {names[-1]} it is faster and its cache larger."
    return f"As it is it needs {forms[0].needed_bytes / memory.GIB:.1f} GiB and {free}: set --quantization {names[0]}."


def config_of(model: str, revision: str | None) -> ModelConfig:
    """The config of a checkpoint; of the published ones it is known without the hub."""
    try:
        return ModelConfig.from_folder(hub.resolve(model, revision, "text"))
    except StartupError:
        for name, values in GEOMETRIES.items():
            if f"-4.5-{name}-" in f"{model.lower()}-":
                return ModelConfig.from_dict(values, source=f"geometry {name}")
        raise


def table(forms: list[Form], free: int, speed: float, num_layers: int) -> Table:
    """A row a form: memory, whether it is there, and the speed to expect, which its layers bound in a small model."""
    shown = Table(
        "weights", "memory needed", "fits", "tokens a second, one stream, predicted", box=None, header_style="bold"
    )
    for form in forms:
        least, most = speeds(form, speed, num_layers)
        fits = "yes" if form.needed_bytes <= free else "no"
        expected = f"{least:.1f} - {most:.1f}" if least < most else f"about {most:.0f}"
        shown.add_row(form.name, f"{form.needed_bytes / memory.GIB:.1f} GiB", fits, expected)
    return shown


def speeds(form: Form, speed: float, num_layers: int) -> tuple[float, float]:
    """Tokens a second to expect, at least and at most; one and the same where its layers bound them."""
    least, most = (min(share * speed / form.token_bytes, 1 / (num_layers * _LAYER_SECONDS)) for share in _REACHED)
    return least, most


def advice(
    forms: list[Form], config: ModelConfig, *, free: int, total: int, disk: int, speed: float, compiler: bool
) -> list[str]:
    """What to do, most important first."""
    said = []
    fitting = [form for form in forms if form.needed_bytes <= free]
    smallest = forms[-1]
    bound = (form for form in fitting if len(set(speeds(form, speed, config.num_hidden_layers))) == 1)
    best = next(bound, fitting[-1] if fitting else smallest)  # no smaller one is faster
    if fitting:
        is_recipe = best.name in RECIPES and config.quantization is None
        said.append(f"It can be served{f', fastest with --quantization {best.name}' if is_recipe else ' as it is'}.")
    elif smallest.needed_bytes <= total:
        said.append(
            f"It does not fit now: end other programs until {smallest.needed_bytes / memory.GIB:.1f} GiB are free "
            f"({free / memory.GIB:.1f} are), or use --kv-cache-dtype int8 and a lower --max-model-len."
        )
    else:
        said.append(
            f"It does not fit: {smallest.name} needs {smallest.needed_bytes / memory.GIB:.1f} GiB and this machine has "
            f"{total / memory.GIB:.1f}. Use a smaller checkpoint or a machine with more memory."
        )
    if config.quantization is None and best.name in RECIPES:
        original = forms[0].weight_bytes
        passing = loading_bytes(parameter_shapes(config), config, Quantization.of("int4"))
        said.append(
            f"The original takes {original / 1e9:.1f} GB of disk and `ernie-serve quantize` "
            f"{smallest.weight_bytes / 1e9:.1f} GB more in int4; afterwards it starts in seconds. "
            f"Quantizing takes {passing / memory.GIB:.1f} GiB of memory."
        )
        if original + smallest.weight_bytes > disk:
            said.append(
                f"The disk has only {disk / 1e9:.0f} GB free: set HF_HOME to a larger one, or name a folder there."
            )
    if not compiler:
        said.append(
            f"{ADVICE} Without them it is several times slower, and quantized weights take a fifth more memory, of "
            "each process alone."
        )
    if platform.machine() in ("x86_64", "AMD64") and "AVX2" not in instructions():
        said.append("This processor has no AVX2: plain C++ is used, far slower than predicted here.")
    return said


def instructions() -> list[str]:
    """What this processor has of the instructions that the kernels use."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return []
    known = {
        "avx2": "AVX2",
        "avx512f": "AVX-512",
        "avx512_vnni": "AVX-512-VNNI",
        "avx_vnni": "AVX-VNNI",
        "asimddp": "NEON dot",
    }
    return [name for word, name in known.items() if word in words]


def memory_speed(seconds: float, num_bytes: int) -> float:
    """Bytes a second that all threads together read, the median of many passes over so much memory."""
    block = torch.ones(max(1, num_bytes // 8), dtype=torch.int64)
    passes: list[float] = []
    end = time.monotonic() + seconds
    while not passes or time.monotonic() < end:
        began = time.perf_counter()
        block.sum()
        passes.append(block.nbytes / (time.perf_counter() - began))
    return sorted(passes)[len(passes) // 2]


def existing(path: Path) -> Path:
    """The folder itself, or the nearest above that is there."""
    return next(each for each in (path, *path.parents) if each.exists())
