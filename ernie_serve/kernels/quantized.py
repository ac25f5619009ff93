"""Weights of 8 and 4 bits as a GPU reads them, and the way there and back in plain torch.

Knows layout and rounding. Knows nothing of the network or of files. `packed.py` is the same for a CPU: its order is
made for AVX, this one for a tile that is loaded, widened and multiplied whole.

int8  q is -127..127, `data` int8 [.., rows, columns], one float32 scale a row: the largest magnitude over 127
fp8   q is e4m3, `data` of that dtype, one float32 scale a row: the largest magnitude over 448
int4  q is -8..7, one bfloat16 scale for 64 columns, [.., rows, columns / 64]. `data` is uint8 [.., rows, columns / 2]:
      byte j of a unit of 128 columns holds column j in its low half and column 64 + j in its high one, each plus 8. So
      a half is 64 whole columns under one scale, which multiplies the sum of a dot, not every weight.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ernie_serve.errors import SettingsError

Format = Literal["int8", "fp8", "int4"]

GROUP = 64
UNIT = 2 * GROUP
_LARGEST = {"int8": 127.0, "fp8": 448.0}


@dataclass(frozen=True, slots=True)
class Quantized:
    """One matrix [rows, columns], or a stack of them with a dimension E before."""

    data: Tensor
    scales: Tensor
    format: Format

    @property
    def shape(self) -> torch.Size:
        """Of the numbers: [rows, columns], or [E, rows, columns]."""
        *front, columns = self.data.shape
        return torch.Size((*front, 2 * columns if self.format == "int4" else columns))

    @property
    def nbytes(self) -> int:
        """Memory of data and scales."""
        return self.data.nbytes + self.scales.nbytes

    def __getitem__(self, expert: int) -> "Quantized":
        """One matrix of a stack, sharing its memory."""
        return Quantized(self.data[expert], self.scales[expert], self.format)

    def __len__(self) -> int:
        """Matrices of a stack."""
        return len(self.data)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers, [.., rows, columns]."""
        if self.format != "int4":
            return (self.data.float() * self.scales[..., None]).to(dtype)
        units = self.data.reshape(*self.data.shape[:-1], -1, GROUP)  # [.., units, 64]
        q = torch.stack((units & 15, units >> 4), dim=-2).flatten(-3, -2).float() - 8  # [.., groups, 64]
        return (q * self.scales[..., None].float()).flatten(-2).to(dtype)


def require_quantizable(columns: int, format: Format, name: str = "A matrix") -> None:
    """Raise `SettingsError` unless rows of so many columns can have this format."""
    if format == "int4" and columns % UNIT:
        raise SettingsError(
            f"{name} has {columns} columns; int4 experts on a GPU need a multiple of {UNIT}. "
            "Set --quantization int8, or serve this checkpoint without it."
        )


AT_ONCE = 1 << 24
"""Numbers that are rounded at once: each takes several float copies, for which a card may have no room."""


def quantize(weight: Tensor, format: Format) -> Quantized:
    """The nearest matrix to `weight` [.., rows, columns] in this format, by the largest magnitude of row or group.

    Rows are rounded some at a time, at most `AT_ONCE` numbers.
    """
    *front, columns = weight.shape
    parts = torch.split(weight.reshape(-1, columns), max(1, AT_ONCE // columns))
    some = [_quantize(rows, format) for rows in parts]
    data, scales = torch.cat([each.data for each in some]), torch.cat([each.scales for each in some])
    return Quantized(data.view(*front, -1), scales.view(*front, *scales.shape[1:]), format)


def _quantize(weight: Tensor, format: Format) -> Quantized:
    if format == "int4":
        return _quantize_int4(weight)
    scales = weight.abs().amax(-1).float() * (1 / _LARGEST[format])  # as CUDA divides by a number: alike everywhere
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    q = weight.float() * inverse[..., None]
    data = q.round().to(torch.int8) if format == "int8" else q.clamp(-448, 448).to(torch.float8_e4m3fn)
    return Quantized(data, scales, format)


def _quantize_int4(weight: Tensor) -> Quantized:
    """Each group's largest magnitude becomes -8: the longer end of four bits serves whichever sign needs it."""
    require_quantizable(weight.shape[-1], "int4")
    groups = weight.float().reshape(*weight.shape[:-1], -1, GROUP)  # [.., groups, 64]
    at = groups.abs().argmax(-1, keepdim=True)
    scales = (groups.gather(-1, at)[..., 0] / -8).to(torch.bfloat16)
    inverse = torch.where(scales != 0, 1 / scales.float(), 0.0)
    q = ((groups * inverse[..., None]).round().clamp(-8, 7) + 8).to(torch.uint8)
    units = q.reshape(*q.shape[:-2], -1, 2, q.shape[-1])  # [.., units, 2, 64]
    return Quantized((units[..., 0, :] | units[..., 1, :] << 4).flatten(-2), scales, format="int4")
