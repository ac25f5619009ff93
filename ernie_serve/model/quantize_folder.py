"""Writes the quantized form of a checkpoint folder, to be served without the original.

Knows which files a checkpoint has. Knows nothing of layouts, rounding, or how tensors lie in a file.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch

from ernie_serve.errors import SettingsError
from ernie_serve.kernels.fused import cpu_kernels
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.forms import Quantize
from ernie_serve.model.new_folder import new_folder
from ernie_serve.model.placing import Progress, into_parameters
from ernie_serve.model.quantize import bits_of, model_bytes, parameter_shapes, read_quantized
from ernie_serve.model.quantized_files import SHARD_BYTES, QuantizedWriter
from ernie_serve.model.recipes import Quantization

_TEXT = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md")
"""What is copied beside the weights, but for what belongs to those of the original."""


def quantize_folder(
    source: Path,
    folder: Path,
    quantization: Quantization,
    progress: Progress | None = None,
    *,
    quantize: Quantize | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write `folder` from a plain checkpoint, a few matrices in memory at a time; the bytes of its weights.

    It appears when it is whole. Raises `CheckpointError` and `SettingsError`, for what can be known before, before
    anything is read or written.
    """
    config = ModelConfig.from_folder(source)
    if config.quantization is not None:
        raise SettingsError(
            f"{source} is quantized already ({config.quantization.recipe}): quantizing twice adds its errors. "
            "Name the original checkpoint."
        )
    plain: torch.dtype = getattr(torch, config.dtype)
    shapes = parameter_shapes(config)
    bits = bits_of(shapes, quantization)
    num_bytes = model_bytes(shapes, quantization, plain)
    with new_folder(folder, num_bytes) as unfinished:
        with torch.device("meta"):
            model = Ernie(config, kernels_of(quantization), plain)
        with closing(QuantizedWriter(unfinished, shapes, bits, plain, shard_bytes)) as writer:
            rest = into_parameters(model, torch.device("cpu"), frozenset(bits))
            read_quantized(model, source, bits, writer.put, rest, progress, quantize=quantize)
            for name, parameter in model.named_parameters():
                if name not in bits:
                    writer.put_plain(name, parameter)
            writer.finish()
        for path in _beside_the_weights(source):
            shutil.copyfile(path, unfinished / path.name)
        write_config(source, unfinished, quantization)
    return num_bytes


def kernels_of(quantization: Quantization) -> ReferenceKernels:
    """What makes its matrices, and reads them on a CPU; nothing is compiled for those of a GPU."""
    return cpu_kernels() if quantization.device == "cpu" else ReferenceKernels()


def write_config(source: Path, folder: Path, quantization: Quantization) -> None:
    """The original's `config.json`, with an entry that says how the weights are packed."""
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] = quantization.as_config()
    (folder / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _beside_the_weights(source: Path) -> Iterator[Path]:
    for pattern in _TEXT:
        for path in source.glob(pattern):
            if path.is_file() and path.name != "config.json" and not path.name.endswith(".safetensors.index.json"):
                yield path
