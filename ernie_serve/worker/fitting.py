"""What a checkpoint takes of a device in each form of its weights, and what a token reads of it.

Knows arithmetic over a config. Asks no machine and loads nothing.
"""

from dataclasses import dataclass

import torch

from ernie_serve.config import USUAL_NUM_SEQS, Settings
from ernie_serve.errors import SettingsError
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.loading import quantization_of
from ernie_serve.model.quantize import (
    Shapes,
    bits_of,
    model_bytes,
    parameter_bytes,
    parameter_shapes,
    widened_bytes,
)
from ernie_serve.model.recipes import Quantization, Recipe, class_of
from ernie_serve.worker import memory

CONTEXT = 4096
"""Tokens of context that there is to be room for."""

_CPU = torch.device("cpu")
_RUNTIME_BYTES = 600 << 20
"""About what Python, torch and the API's process take of memory. A GPU's share for CUDA is kept free anyway."""

_RECIPES: dict[str, tuple[Recipe, ...]] = {
    "cpu": ("int8", "mixed", "int4"),
    "cuda": ("int8", "fp8", "mixed", "int4"),
}


@dataclass(frozen=True, slots=True)
class Form:
    """A checkpoint in one form of its weights: what it takes and what a token reads. `name` is the flag's word.

    `many_bytes` is what a step reads of weights and cache for 64 streams of `CONTEXT` tokens.
    """

    name: str
    weight_bytes: int
    needed_bytes: int
    token_bytes: int
    many_bytes: int


def forms_of(config: ModelConfig, device: torch.device = _CPU) -> list[Form]:
    """The forms that a checkpoint can be served in on such a device, the largest first."""
    shapes = parameter_shapes(config)
    own: torch.dtype = getattr(torch, config.dtype)
    if config.quantization is not None:
        stored = quantization_of(config, None, device)
        return [_form(config.quantization.recipe, config, shapes, stored, device)]
    found = [_form(config.dtype, config, shapes, None, device, own)]
    for recipe in _RECIPES[device.type]:
        try:
            found.append(_form(recipe, config, shapes, quantization_of(config, recipe, device), device))
        except SettingsError:  # its widths cannot have it, or it has no experts
            continue
    return found


def _form(
    name: str,
    config: ModelConfig,
    shapes: Shapes,
    quantization: Quantization | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Form:
    own: torch.dtype = getattr(torch, config.dtype)
    plain = dtype or (own if device.type == "cuda" else torch.float32)
    weights = model_bytes(shapes, quantization, plain)
    cache = memory.bytes_per_block(config, own, 16) * CONTEXT // 16
    return Form(
        name,
        weights,
        weights
        + cache
        + (
            _step_bytes_of_gpu(config, plain) + 2 * widened_bytes(shapes, quantization, plain)
            if device.type == "cuda"
            else _step_bytes(config, plain)
        ),
        token_bytes(config, shapes, quantization, plain),
        token_bytes(config, shapes, quantization, plain, streams=64) + 64 * cache,
    )


def _step_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What a CPU needs beside weights and cache, with short steps of few requests."""
    return memory.step_bytes(config, dtype, 512, 16) + _RUNTIME_BYTES


def _step_bytes_of_gpu(config: ModelConfig, dtype: torch.dtype) -> int:
    """What a GPU needs beside them, with the settings' defaults."""
    seqs = USUAL_NUM_SEQS["cuda"]
    step = memory.step_bytes(config, dtype, Settings().max_num_batched_tokens, seqs, memory.SCORED_TOKENS)
    recorded = memory.recorded_bytes(config, dtype, seqs, config.max_position_embeddings)
    return step + recorded + memory.gathered_bytes(config, dtype) * CONTEXT


def token_bytes(
    config: ModelConfig,
    shapes: Shapes,
    quantization: Quantization | None,
    dtype: torch.dtype,
    streams: int = 1,
) -> int:
    """Bytes of weights that a step reads for a token of each stream: all matrices once, of the experts those chosen.

    Streams choose by chance and evenly, so that several read an expert that is read once.
    """
    bits = bits_of(shapes, quantization) if quantization else {}
    total = 0
    unchosen = ((config.moe_num_experts - config.moe_k) / config.moe_num_experts) ** streams if config.moe_k else 0
    for name, shape in shapes.items():
        if name == "embed_tokens.weight" and not config.tie_word_embeddings:
            continue
        size = parameter_bytes(name, shape, bits.get(name), dtype)
        total += round(size * (1 - unchosen)) if class_of(name) == "experts" else size
    return total
