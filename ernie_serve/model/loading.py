"""Fills an empty model from a checkpoint folder, in whichever of the forms it has and is to have.

Knows which loader is for what. Knows no file, no bits and no machine.
"""

from pathlib import Path

import torch

from ernie_serve.errors import SettingsError
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.packing import load_packed
from ernie_serve.model.placing import Progress
from ernie_serve.model.quantize import load_quantized
from ernie_serve.model.quantized_files import load_mapped
from ernie_serve.model.recipes import Quantization, Recipe


def load(
    model: Ernie,
    folder: Path,
    quantization: Quantization | None,
    progress: Progress | None = None,
    *,
    device: torch.device,
) -> None:
    """Fill a model on the meta device: mapped where the folder is quantized, quantized as it is read, or as it is.

    Raises what `load_weights` raises.
    """
    if model.config.quantization is not None:
        load_mapped(model, folder, model.config.quantization, progress)
    elif quantization is not None:
        load_quantized(model, folder, quantization, progress)
    else:
        load_packed(model, folder, progress, device=device)


def quantization_of(config: ModelConfig, wanted: Recipe | None, device: torch.device) -> Quantization | None:
    """How a checkpoint's matrices are to be kept. Raises `SettingsError` where that cannot be."""
    stored = config.quantization
    if stored is not None and wanted not in (None, stored.recipe):
        raise SettingsError(
            f"--quantization {wanted}: this checkpoint is quantized already ({stored.recipe}). Leave the flag out, or "
            f"name the original checkpoint."
        )
    found = stored or (Quantization.of(wanted) if wanted else None)
    if found is not None and device.type != "cpu":
        source = "This checkpoint's" if stored else "--quantization"
        raise SettingsError(
            f"{source} {found.recipe} weights are served on a CPU only, and the device is {device}. "
            "Use --device cpu, or " + ("the original checkpoint." if stored else "leave --quantization out.")
        )
    return found


def dtypes_of(
    config: ModelConfig, quantization: Quantization | None, arithmetic: str, cache: str
) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of numbers between operators, and that of the KV cache (int8 for 8 bits), by the settings' words.

    Beside quantized matrices "auto" arithmetic is float32, which needs nothing of the processor, and the cache keeps
    the checkpoint's dtype. Raises `SettingsError` for what no kernel takes.
    """
    if quantization is not None and arithmetic == "float16":
        raise SettingsError("--dtype float16: quantized matrices multiply float32 or bfloat16. Leave --dtype out.")
    own: torch.dtype = getattr(torch, config.dtype)
    dtype = getattr(torch, arithmetic) if arithmetic != "auto" else torch.float32 if quantization is not None else own
    if cache == "int8":
        return dtype, torch.int8
    return dtype, own if quantization is not None and arithmetic == "auto" else dtype
