"""Puts 4-bit and 8-bit matrices in the places of a model's parameters, quantized as they are read.

Knows which parameters are matrices, how many bits each gets, and what that takes. Knows neither how bits lie in a unit
nor what a file looks like; the page of the network learns nothing of it.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ernie_serve.kernels.nibbles import nibble_bytes
from ernie_serve.kernels.packed import Bits, Packed, empty, padded, require_packable, unit_bytes
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.packing import set_matrix
from ernie_serve.model.placing import Progress, Put, into_matrices, into_parameters
from ernie_serve.model.recipes import Quantization, class_of
from ernie_serve.model.repacking import Repacked
from ernie_serve.model.weights import load_weights

Shapes = Mapping[str, torch.Size]

Quantize = Callable[[str, Tensor, Bits], Packed]
"""From a matrix [out, in] of the parameter of that name to its packed form."""

KeepPacked = Callable[[str, int | None, Packed], None]
"""Takes a packed matrix: which parameter it is, or which expert of it. Several threads call it."""

READING_BYTES = 320 << 20
"""About what quantizing takes beside the finished model and its largest matrix: buffers to read and to round in."""


def load_quantized(
    model: Ernie,
    folder: Path,
    quantization: Quantization,
    progress: Progress | None = None,
    *,
    quantize: Quantize | None = None,
) -> None:
    """Fill a model on the meta device from a plain checkpoint, each matrix in its bits as soon as it is read.

    Stacks of experts are made once and filled; beside them only the matrices being read are there in full. Rows of
    the embedding are looked up in its packed form too, which a tied head shares unless the kernels repack matrices.
    Raises what `load_weights` raises, and `SettingsError` for a width that cannot be packed, before anything is read.
    """
    bits = bits_of(shapes_of(model), quantization)
    rest = into_parameters(model, torch.device("cpu"), frozenset(bits))
    if model.kernels.repacks():
        repacked = Repacked(model, bits)
        read_quantized(model, folder, bits, repacked.keep, rest, progress, quantize=quantize)
        repacked.finish()
        return
    made: dict[str, Packed] = {
        name: empty(shape[1], shape[2], bits[name], shape[0])
        for name, shape in shapes_of(model).items()
        if name in bits and len(shape) == 3
    }

    def keep(name: str, expert: int | None, packed: Packed) -> None:
        if expert is None:
            made[name] = packed
            return
        place = made[name][expert]
        place.data.copy_(packed.data)
        place.row_scales.copy_(packed.row_scales)

    read_quantized(model, folder, bits, keep, rest, progress, quantize=quantize)
    for name, packed in made.items():
        set_matrix(model, name, packed)


def read_quantized(
    model: Ernie,
    folder: Path,
    bits: Mapping[str, Bits],
    keep: KeepPacked,
    rest: Put,
    progress: Progress | None = None,
    *,
    quantize: Quantize | None = None,
) -> None:
    """Read a plain checkpoint and give each matrix that has bits to `keep` when it is whole; others go to `rest`.

    `quantize` is the kernels' unless given.
    """
    shapes = {name: shape for name, shape in shapes_of(model).items() if name in bits}
    dtype: torch.dtype = getattr(torch, model.config.dtype)

    def packed(name: str, expert: int | None, matrix: Tensor) -> None:
        made = quantize(name, matrix, bits[name]) if quantize else model.kernels.quantize(matrix, bits[name])
        keep(name, expert, made)

    load_weights(model, folder, progress, put=into_matrices(shapes, dtype, packed, rest))


def shapes_of(model: Ernie) -> dict[str, torch.Size]:
    """Name and shape of every parameter, also of an empty model."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def bits_of(shapes: Shapes, quantization: Quantization) -> dict[str, Bits]:
    """The bits of every matrix. Raises `SettingsError` for one whose width cannot be packed."""
    bits: dict[str, Bits] = {}
    for name, shape in shapes.items():
        if (kind := class_of(name)) is not None:
            require_packable(shape[-1], f"{name} of this checkpoint")
            bits[name] = quantization.bits[kind]
    return bits


def packed_bytes(shape: torch.Size, bits: Bits) -> int:
    """Memory of a matrix, or of a stack, once packed."""
    return _padded_rows(shape) * (shape[-1] // 64 * unit_bytes(bits) // 8 + 4)


def model_bytes(shapes: Shapes, quantization: Quantization | None, dtype: torch.dtype) -> int:
    """Memory of all parameters: matrices in their bits, or in `dtype`; routers in float32."""
    bits = bits_of(shapes, quantization) if quantization else {}
    return sum(
        packed_bytes(shape, bits[name])
        if name in bits
        else math.prod(shape) * (4 if ".router." in name else dtype.itemsize)
        for name, shape in shapes.items()
    )


def repacking_bytes(shapes: Shapes, quantization: Quantization) -> int:
    """What the same takes more where the kernels repack matrices, and look rows of the embedding up as they were."""
    more = 0
    for name, bits in bits_of(shapes, quantization).items():
        *stack, rows, columns = shapes[name]
        if name != "embed_tokens.weight":
            more += math.prod(stack) * nibble_bytes(rows, columns, bits) - packed_bytes(shapes[name], bits)
        elif "lm_head.weight" not in shapes:
            more += nibble_bytes(rows, columns, bits)
    return more


def loading_bytes(shapes: Shapes, config: ModelConfig) -> int:
    """What quantizing a plain checkpoint takes for a while beside the model it makes."""
    largest = max(math.prod(shape[-2:]) for name, shape in shapes.items() if class_of(name))
    return int(largest * getattr(torch, config.dtype).itemsize) + READING_BYTES


def _padded_rows(shape: torch.Size) -> int:
    return math.prod(shape[:-2]) * padded(shape[-2])
