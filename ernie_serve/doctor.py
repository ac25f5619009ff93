"""The verb `doctor`: whether this machine can serve a checkpoint, how fast to expect it, and what to change.

Knows this machine by asking it, and a checkpoint by its `config.json`. Loads nothing and serves nothing. What it says
of speed is a prediction, from how fast this machine reads its memory and how many bytes a token reads.
"""

import math
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table

from ernie_serve import launch
from ernie_serve.config import Settings
from ernie_serve.errors import SettingsError, StartupError
from ernie_serve.kernels.native import ADVICE, tools_path
from ernie_serve.model import hub
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.quantize import Shapes, bits_of, loading_bytes, model_bytes, packed_bytes
from ernie_serve.model.random_checkpoint import GEOMETRIES, parameter_shapes
from ernie_serve.model.recipes import RECIPES, Quantization, class_of
from ernie_serve.worker import memory
from ernie_serve.worker.cores import usable_cores

DEFAULT = "baidu/ERNIE-4.5-21B-A3B-PT"
PROBE_SECONDS = 5.0
RUNTIME_BYTES = 600 << 20
"""About what Python, torch and the API's process take beside weights, cache and a step."""

_TOKENS = 4096  # of context that the table has room for
_REACHED = (0.7, 0.95)  # of the memory's speed, by decoding
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Form:
    """A checkpoint in one form of its weights: what it takes and what a token reads. `name` is the flag's word."""

    name: str
    weight_bytes: int
    needed_bytes: int
    token_bytes: int


def examine(model: str, *, revision: str | None, threads: int | None) -> None:
    """Look at the machine and the checkpoint, and print what was found. Raises `StartupError` for a wrong name."""
    console = Console(highlight=False)
    cores = threads or usable_cores()
    torch.set_num_threads(cores)
    config = config_of(model or DEFAULT, revision)
    total, free = memory.total_bytes(), memory.free_bytes(_CPU)
    console.print(f"Reading memory for {PROBE_SECONDS:.0f} seconds …", end="\r")
    speed = memory_speed(PROBE_SECONDS, min(1 << 30, free // 4))
    disk = shutil.disk_usage(existing(Path(constants.HF_HUB_CACHE))).free
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    facts = Table.grid(padding=(0, 2))
    for name, value in {
        "Cores": f"{cores} used of {os.cpu_count()}; instructions: {', '.join(instructions()) or 'none that help'}",
        "Memory": f"{total / memory.GIB:.1f} GiB, {free / memory.GIB:.1f} free; read at {speed / 1e9:.1f} GB/s",
        "Disk": f"{disk / 1e9:.0f} GB free in {constants.HF_HUB_CACHE}",
        "PyTorch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "Compiler": f"{compiler or 'none'}; ninja: {shutil.which('ninja') or 'none'}",
    }.items():
        facts.add_row(f"[bold]{name}[/]", value)
    console.print(facts)
    forms = forms_of(config)
    console.print(f"\n{model or DEFAULT}, {_TOKENS:,} tokens of context:")
    console.print(table(forms, free, speed))
    for line in advice(
        forms,
        config,
        free=free,
        total=total,
        disk=disk,
        compiler=bool(compiler and shutil.which("ninja", path=tools_path())),
    ):
        console.print(f"- {line}", soft_wrap=True)


def config_of(model: str, revision: str | None) -> ModelConfig:
    """The config of a checkpoint; of the published ones it is known without the hub."""
    try:
        folder = hub.resolve(launch.with_checkpoint(Settings(model=model)).model, revision, "text")
        return ModelConfig.from_folder(folder)
    except StartupError:
        for name, values in GEOMETRIES.items():
            if f"-4.5-{name}-" in f"{model.lower()}-":
                return ModelConfig.from_dict(values, source=f"geometry {name}")
        raise


def forms_of(config: ModelConfig) -> list[Form]:
    """The forms that a checkpoint can be served in, the largest first."""
    shapes = parameter_shapes(config)
    own: torch.dtype = getattr(torch, config.dtype)
    stored = config.quantization
    found = [] if stored else [_form(config.dtype, config, shapes, None, own)]
    for recipe in ("int8", "mixed", "int4"):
        if stored is None or stored.recipe == recipe:
            try:
                found.append(_form(recipe, config, shapes, stored or Quantization.of(recipe), torch.float32))
            except SettingsError:  # its widths cannot be packed
                break
    return found


def _form(
    name: str, config: ModelConfig, shapes: Shapes, quantization: Quantization | None, dtype: torch.dtype
) -> Form:
    weights = model_bytes(shapes, quantization, dtype)
    cache_dtype: torch.dtype = getattr(torch, config.dtype)
    cache = memory.bytes_per_block(config, cache_dtype, 16) * _TOKENS // 16
    step = memory.step_bytes(config, dtype, 512, 16)
    return Form(name, weights, weights + cache + step + RUNTIME_BYTES, token_bytes(config, shapes, quantization, dtype))


def token_bytes(config: ModelConfig, shapes: Shapes, quantization: Quantization | None, dtype: torch.dtype) -> int:
    """Bytes of weights that one token of one stream reads: all matrices once, of the experts only those chosen."""
    bits = bits_of(shapes, quantization) if quantization else {}
    total = 0
    for name, shape in shapes.items():
        if name == "embed_tokens.weight" and not config.tie_word_embeddings:
            continue
        size = (
            packed_bytes(shape, bits[name])
            if name in bits
            else math.prod(shape) * (4 if ".router." in name else dtype.itemsize)
        )
        total += size * config.moe_k // config.moe_num_experts if class_of(name) == "experts" else size
    return total


def table(forms: list[Form], free: int, speed: float) -> Table:
    """A row a form: memory, whether it is there, and the speed to expect."""
    shown = Table(
        "weights", "memory needed", "fits", "tokens a second, one stream, predicted", box=None, header_style="bold"
    )
    for form in forms:
        least, most = (share * speed / form.token_bytes for share in _REACHED)
        fits = "yes" if form.needed_bytes <= free else "no"
        shown.add_row(form.name, f"{form.needed_bytes / memory.GIB:.1f} GiB", fits, f"{least:.1f} - {most:.1f}")
    return shown


def advice(forms: list[Form], config: ModelConfig, *, free: int, total: int, disk: int, compiler: bool) -> list[str]:
    """What to do, most important first."""
    said = []
    fitting = [form for form in forms if form.needed_bytes <= free]
    smallest = forms[-1]
    if fitting:
        best = fitting[-1]
        flag = f"--quantization {best.name}" if best.name in RECIPES and config.quantization is None else "as it is"
        said.append(f"It can be served, fastest with {flag}.")
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
    if config.quantization is None and smallest.name in RECIPES:
        original = forms[0].weight_bytes
        passing = loading_bytes(parameter_shapes(config), config)
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
