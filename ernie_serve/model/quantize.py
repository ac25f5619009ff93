"""Puts 4-bit and 8-bit matrices in the places of a model's parameters, quantized as they are read.

Knows which parameters are matrices, which form each gets, and what that takes. Knows neither how bits lie in a form
nor what a file looks like; the page of the network learns nothing of it.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ernie_serve.kernels.nibbles import nibble_bytes
from ernie_serve.kernels.quantized import AT_ONCE
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.model import forms
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.forms import Form, Kept, Quantize
from ernie_serve.model.packing import set_matrix
from ernie_serve.model.placing import Progress, Put, into_matrices, into_parameters
from ernie_serve.model.recipes import Quantization, class_of
from ernie_serve.model.repacking import Repacked, is_repacked
from ernie_serve.model.shards import Source
from ernie_serve.model.weights import load_weights

Shapes = Mapping[str, torch.Size]

Keep = Callable[[str, int | None, Kept], None]
"""Takes a quantized matrix: which parameter it is, or which expert of it. Several threads call it."""

_CPU = torch.device("cpu")

READING_BYTES = 320 << 20
"""About what quantizing takes beside the finished model and its largest matrix: buffers to read and to round in."""


ROUNDING_BYTES = 32
"""About what rounding on a GPU takes for each number that is being rounded, all copies together."""


def load_quantized(
    model: Ernie,
    source: Source,
    quantization: Quantization,
    progress: Progress | None = None,
    *,
    quantize: Quantize | None = None,
    device: torch.device = _CPU,
) -> None:
    """Fill a model on the meta device from a plain checkpoint, each matrix in its form as soon as it is read.

    Stacks of experts are made once on the device and filled; beside them only the matrices being read are there in
    full, on the CPU, and the one being rounded on the device. Rows of the embedding are looked up in its packed form
    too, which a tied head shares unless the kernels repack matrices. Raises what `load_weights` raises, and
    `SettingsError` for a width that a form cannot have, before anything is read.
    """
    shapes = shapes_of(model)
    bits = bits_of(shapes, quantization)
    rest = into_parameters(model, device, frozenset(bits))
    quantize = quantize or forms.quantizer(model.kernels, device)
    if is_repacked(quantization, model.kernels):
        repacked = Repacked(model, bits)
        read_quantized(model, source, bits, repacked.keep, rest, progress, quantize=quantize)
        repacked.finish()
        return
    made = {name: forms.empty(shapes[name], form, device) for name, form in bits.items() if len(shapes[name]) == 3}

    def keep(name: str, expert: int | None, matrix: Kept) -> None:
        if expert is None:
            made[name] = matrix
            return
        place = forms.tensors_of(made[name][expert])
        for part, tensor in forms.tensors_of(matrix).items():
            place[part].copy_(tensor)

    read_quantized(model, source, bits, keep, rest, progress, quantize=quantize)
    for name, matrix in made.items():
        set_matrix(model, name, matrix)


def read_quantized(
    model: Ernie,
    source: Source,
    bits: Mapping[str, Form],
    keep: Keep,
    rest: Put,
    progress: Progress | None = None,
    *,
    quantize: Quantize | None = None,
) -> None:
    """Read a plain checkpoint and give each matrix that has bits to `keep` when it is whole; others go to `rest`.

    `quantize` is the CPU's unless given.
    """
    shapes = {name: shape for name, shape in shapes_of(model).items() if name in bits}
    dtype: torch.dtype = getattr(torch, model.config.dtype)
    made = quantize or forms.quantizer(model.kernels, _CPU)

    def whole(name: str, expert: int | None, matrix: Tensor) -> None:
        keep(name, expert, made(name, matrix, bits[name]))

    load_weights(model, source, progress, put=into_matrices(shapes, dtype, whole, rest))


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter that a model of this config has."""
    with torch.device("meta"):
        return shapes_of(Ernie(config, ReferenceKernels()))


def shapes_of(model: Ernie) -> dict[str, torch.Size]:
    """Name and shape of every parameter, also of an empty model."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def bits_of(shapes: Shapes, quantization: Quantization) -> dict[str, Form]:
    """The bits, or the GPU's format, of every matrix that has some. Raises `SettingsError` for a width without."""
    bits: dict[str, Form] = {}
    for name, shape in shapes.items():
        kind = class_of(name)
        if kind is not None and kind in quantization.bits:
            form = quantization.bits[kind]
            forms.require(form, shape[-1], f"{name} of this checkpoint")
            bits[name] = form
    return bits


def parameter_bytes(name: str, shape: torch.Size, form: Form | None, dtype: torch.dtype) -> int:
    """Memory of a parameter in its form, or in `dtype`; routers are float32."""
    if form is not None:
        return forms.num_bytes(shape, form)
    return math.prod(shape) * (4 if ".router." in name else dtype.itemsize)


def model_bytes(shapes: Shapes, quantization: Quantization | None, dtype: torch.dtype) -> int:
    """Memory of all parameters: matrices in their form, or in `dtype`; routers in float32."""
    bits = bits_of(shapes, quantization) if quantization else {}
    return sum(parameter_bytes(name, shape, bits.get(name), dtype) for name, shape in shapes.items())


def repacking_bytes(shapes: Shapes, quantization: Quantization) -> int:
    """What a model for a CPU takes more where the kernels repack matrices, and look rows up in them as they were."""
    more = 0
    for name, form in bits_of(shapes, quantization).items():
        assert isinstance(form, int), "what a GPU reads is not repacked"
        *stack, rows, columns = shapes[name]
        if name != "embed_tokens.weight":
            more += math.prod(stack) * nibble_bytes(rows, columns, form) - forms.num_bytes(shapes[name], form)
        elif "lm_head.weight" not in shapes:
            more += nibble_bytes(rows, columns, form)
    return more


def copying_bytes(shapes: Shapes, quantization: Quantization) -> int:
    """What repacking takes for a while: the largest matrix as it was, and no more than that again to reorder it in."""
    bits = bits_of(shapes, quantization)
    return 2 * max(forms.num_bytes(shapes[name][-2:], form) for name, form in bits.items())


def widened_bytes(shapes: Shapes, quantization: Quantization | None, dtype: torch.dtype) -> int:
    """The largest matrix that a GPU makes wide for the rows of a prompt: 8 bits, and not one of a stack."""
    bits = bits_of(shapes, quantization) if quantization and quantization.device == "cuda" else {}
    found = (math.prod(shapes[name]) for name, form in bits.items() if form != "int4" and len(shapes[name]) == 2)
    return max(found, default=0) * dtype.itemsize


def loading_bytes(shapes: Shapes, config: ModelConfig, quantization: Quantization) -> int:
    """What quantizing a plain checkpoint takes for a while beside the model it makes, where the model is made."""
    largest = max(math.prod(shape[-2:]) for name, shape in shapes.items() if class_of(name) in quantization.bits)
    if quantization.device == "cuda":
        came: int = getattr(torch, config.dtype).itemsize  # beside it twice what becomes of it
        return (came + 2) * largest + min(largest, AT_ONCE) * ROUNDING_BYTES
    return int(largest * getattr(torch, config.dtype).itemsize) + READING_BYTES
