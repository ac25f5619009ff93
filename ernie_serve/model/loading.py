"""Fills an empty model from a checkpoint folder, in whichever of the forms it has and is to have.

Knows which loader is for what. Knows no file, no bits and no machine.
"""

from pathlib import Path

import torch

from ernie_serve.errors import SettingsError
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.dummy import DummyShards
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.packing import load_packed
from ernie_serve.model.placing import Progress
from ernie_serve.model.quantize import load_quantized
from ernie_serve.model.quantized_files import load_mapped, load_read
from ernie_serve.model.recipes import DeviceKind, Quantization, Recipe

_CPU = torch.device("cpu")

FP8_CAPABILITY = (8, 9)
"""The least compute capability (Ada, then Hopper) that fp8 compiles for."""


def load(
    model: Ernie,
    folder: Path,
    quantization: Quantization | None,
    progress: Progress | None = None,
    *,
    device: torch.device,
    dummy: bool = False,
) -> None:
    """Fill a model on the meta device: a quantized folder is mapped on a CPU and read into a GPU, a plain one is
    quantized as it is read, or taken as it is. With `dummy` numbers by chance stand for those of a plain folder.

    Raises what `load_weights` raises, and `SettingsError` for `dummy` weights of a quantized folder.
    """
    stored = model.config.quantization
    if dummy and stored is not None:
        raise SettingsError(
            "--load-format dummy: this checkpoint is quantized. Name the original one, and set --quantization."
        )
    source = DummyShards(folder, model.config) if dummy else folder
    if stored is not None and stored.device == "cpu":
        load_mapped(model, folder, stored, progress)
    elif stored is not None:
        load_read(model, folder, stored, progress, device=device)
    elif quantization is not None:
        load_quantized(model, source, quantization, progress, device=device)
    else:
        load_packed(model, source, progress, device=device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what rounding took is the KV cache's


def quantization_of(config: ModelConfig, wanted: Recipe | None, device: torch.device) -> Quantization | None:
    """How a checkpoint's matrices are to be kept. Raises `SettingsError` where that cannot be."""
    stored = config.quantization
    if stored is not None and wanted not in (None, stored.recipe):
        raise SettingsError(
            f"--quantization {wanted}: this checkpoint is quantized already ({stored.recipe}). Leave the flag out, or "
            f"name the original checkpoint."
        )
    kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
    if stored is not None and stored.device != kind:
        raise SettingsError(
            f"This checkpoint was quantized for --device {stored.device}, and the device is {device}. Use --device "
            f"{stored.device}, or quantize the original with `ernie-serve quantize --device {kind}`."
        )
    if stored is not None or wanted is None:
        return stored
    if kind == "cuda" and not config.moe_num_experts and wanted in ("int4", "mixed"):
        raise SettingsError(
            f"--quantization {wanted}: on a GPU 4 bits are for experts, and this checkpoint has none. Set int8 or fp8."
        )
    return Quantization.of(wanted, kind)


def dtypes_of(
    config: ModelConfig, quantization: Quantization | None, arithmetic: str, cache: str, device: torch.device = _CPU
) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of numbers between operators, and that of the KV cache (int8 for 8 bits), by the settings' words.

    On a CPU "auto" arithmetic beside quantized matrices is float32, which needs nothing of the processor, and the cache
    keeps the checkpoint's dtype, unless that is float16, which no operator reads. Raises `SettingsError` for what no
    kernel takes.
    """
    own: torch.dtype = getattr(torch, config.dtype)
    is_packed = quantization is not None and quantization.device == "cpu"
    dtype = getattr(torch, arithmetic) if arithmetic != "auto" else torch.float32 if is_packed else own
    if quantization is not None and dtype == torch.float16:
        change = (
            "Leave --dtype out." if arithmetic != "auto" else "Set --dtype bfloat16: auto is this checkpoint's own."
        )
        raise SettingsError(f"--dtype {arithmetic}: quantized matrices multiply float32 or bfloat16. {change}")
    if cache == "fp8":
        if device.type != "cuda":
            raise SettingsError(f"--kv-cache-dtype fp8: only a GPU reads it; on {device} use --kv-cache-dtype int8.")
        return dtype, torch.float8_e4m3fn
    if cache == "int8":
        return dtype, torch.int8
    return dtype, own if is_packed and arithmetic == "auto" and own != torch.float16 else dtype


def require_fp8(quantization: Quantization | None, cache_dtype: torch.dtype, capability: tuple[int, int]) -> None:
    """Raise `SettingsError` where fp8 is to be read by a GPU of a compute capability without it."""
    if capability >= FP8_CAPABILITY:
        return
    has = f"fp8 needs a GPU of compute capability 8.9; this one has {capability[0]}.{capability[1]}."
    if quantization is not None and "fp8" in quantization.bits.values():
        raise SettingsError(f"--quantization fp8: {has} Set --quantization int8, from the original checkpoint.")
    if cache_dtype == torch.float8_e4m3fn:
        raise SettingsError(f"--kv-cache-dtype fp8: {has} Set --kv-cache-dtype int8.")
