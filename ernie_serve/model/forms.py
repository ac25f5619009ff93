"""What a matrix of the network is kept as: in bits that a CPU reads, or in a format that a GPU reads.

Knows the tensors that each form is made of: their names, dtypes and shapes, and so their bytes. Knows neither how
numbers lie in them, nor files.
"""

import math
import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ernie_serve.kernels import quantized
from ernie_serve.kernels.packed import COLUMNS, ROWS, Bits, Packed, padded, require_packable, unit_bytes
from ernie_serve.kernels.quantized import GROUP, Format, Quantized, require_quantizable
from ernie_serve.kernels.reference import ReferenceKernels

Form = Bits | Format
"""4 and 8 are `kernels.packed` for a CPU; words are `kernels.quantized` for a GPU."""

Kept = Packed | Quantized

Part = tuple[torch.dtype, tuple[int, ...]]

Quantize = Callable[[str, Tensor, Form], Kept]
"""From a matrix [out, in] of the parameter of that name to what it is kept as. Several threads call it."""


def require(form: Form, columns: int, name: str) -> None:
    """Raise `SettingsError` unless rows of so many columns can be kept so."""
    if isinstance(form, int):
        require_packable(columns, name)
    else:
        require_quantizable(columns, form, name)


def parts(shape: torch.Size, form: Form) -> dict[str, Part]:
    """The tensors of a matrix [.., rows, columns] in this form, by name."""
    *stack, rows, columns = shape
    if isinstance(form, int):
        units = (*stack, padded(rows) // ROWS, columns // COLUMNS, unit_bytes(form))
        return {"data": (torch.uint8, units), "row_scales": (torch.float32, (*stack, padded(rows)))}
    if form == "int4":
        scales = (*stack, rows, columns // GROUP)
        return {"data": (torch.uint8, (*stack, rows, columns // 2)), "scales": (torch.bfloat16, scales)}
    dtype = torch.int8 if form == "int8" else torch.float8_e4m3fn
    return {"data": (dtype, tuple(shape)), "scales": (torch.float32, (*stack, rows))}


def num_bytes(shape: torch.Size, form: Form) -> int:
    """Memory of a matrix, or of a stack."""
    return sum(math.prod(each) * dtype.itemsize for dtype, each in parts(shape, form).values())


def made_of(tensors: Mapping[str, Tensor], shape: torch.Size, form: Form) -> Kept:
    """The matrix of this shape that these tensors, named as by `parts`, are."""
    if isinstance(form, int):
        return Packed(tensors["data"], tensors["row_scales"], form, shape[-2])
    return Quantized(tensors["data"], tensors["scales"], form)


def tensors_of(matrix: Kept) -> dict[str, Tensor]:
    """The tensors of a matrix, named as by `parts`."""
    if isinstance(matrix, Packed):
        return {"data": matrix.data, "row_scales": matrix.row_scales}
    return {"data": matrix.data, "scales": matrix.scales}


def empty(shape: torch.Size, form: Form, device: torch.device) -> Kept:
    """A matrix, or a stack, whose memory is to be filled."""
    made = {name: torch.empty(each, dtype=dtype, device=device) for name, (dtype, each) in parts(shape, form).items()}
    return made_of(made, shape, form)


def quantizer(kernels: ReferenceKernels, device: torch.device) -> Quantize:
    """What puts a matrix of the CPU into its form: packed by the kernels, or rounded on the device it is for.

    A format is rounded in plain torch, which takes several float copies of a matrix: so one at a time.
    """
    lock = threading.Lock()

    def quantize(name: str, matrix: Tensor, form: Form) -> Kept:
        if isinstance(form, int):
            return kernels.quantize(matrix, form)
        with lock:
            return quantized.quantize(matrix.to(device), form)

    return quantize
