"""Packed matrices as torch's own 4-bit product reads them, for machines where `cpu.cpp` cannot be compiled.

Knows that product's contract, in plain torch. Knows nothing of the network or of files, nor how the product lays its
operand out, which depends on the processor: so a matrix goes in, and numbers never come back.

The product takes u in 0..15 and, for each row and each 32 columns, a scale and a zero in bfloat16; a weight is
(u - 8) * scale + zero. The scale here is the group's code, which has 7 bits and a sign and so is exact; the row's
float32 scale multiplies the sum, so it is exact too.

4 bits   u = q + 8, with scale code and zero 0: 5 bits a weight
8 bits   q = 16 * high + low, side by side in a matrix twice as wide, which takes the activations twice: high in -8..7
         with scale 16 * code and zero 0, low in 0..15 with scale code and zero 8 * code: 10 bits a weight

What is rounded: activations to bfloat16, the sum before the row's scale to bfloat16, and with more than a few tokens
each weight times its code, inside the product, to bfloat16.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie_serve.kernels.packed import COLUMNS, GROUP, ROWS, Bits, Packed

_ROWS = 16  # the product takes a multiple of so many rows
_BLOCK = 64  # rows that any processor's order keeps together
_SLICE = 1 << 20  # numbers of a matrix at once: on the way each takes 4 bytes


@dataclass(frozen=True, slots=True)
class Nibbles:
    """One matrix [rows, columns], or a stack of them with a dimension E before."""

    data: Tensor  # uint8 [.., padded rows, copies * columns / 2], in the product's own order
    scales: Tensor  # bfloat16 [.., copies * columns / 32, padded rows, 2]: scale and zero
    row_scales: Tensor  # float32 [.., padded rows]
    bits: Bits
    rows: int

    @property
    def nbytes(self) -> int:
        """Memory of data and scales."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def __getitem__(self, expert: int) -> "Nibbles":
        """One matrix of a stack, sharing its memory."""
        return Nibbles(self.data[expert], self.scales[expert], self.row_scales[expert], self.bits, self.rows)

    def __len__(self) -> int:
        """Matrices of a stack."""
        return len(self.data)

    def copy_(self, other: "Nibbles") -> None:
        """Take the numbers of another matrix of this shape."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(theirs)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.data, self.scales, self.row_scales

    def product(self, x: Tensor) -> Tensor:
        """`x` [T, columns] by this one matrix: [T, rows], in x's dtype."""
        narrow = x.to(torch.bfloat16)
        narrow = torch.cat((narrow, narrow), dim=1) if self.bits == 8 else narrow.contiguous()
        sums = torch.ops.aten._weight_int4pack_mm_for_cpu(narrow, self.data, GROUP, self.scales)
        y: Tensor = sums[:, : self.rows] * self.row_scales[: self.rows]
        return y.to(x.dtype)


def available() -> bool:
    """Whether this torch has the product."""
    return hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


def nibble_bytes(rows: int, columns: int, bits: Bits) -> int:
    """Memory of a matrix in this form."""
    copies = bits // 4
    return _padded(rows) * (copies * (columns // 2 + columns // GROUP * 4) + 4)


def empty(rows: int, columns: int, bits: Bits, *stack: int) -> Nibbles:
    """A matrix, or a stack of so many, whose memory is to be filled."""
    height, width = _padded(rows), bits // 4 * columns
    return Nibbles(
        torch.empty((*stack, height, width // 2), dtype=torch.uint8),
        torch.empty((*stack, width // GROUP, height, 2), dtype=torch.bfloat16),
        torch.empty((*stack, height), dtype=torch.float32),
        bits,
        rows,
    )


def repack(packed: Packed) -> Nibbles:
    """The same numbers as `packed`, which is one matrix, a few million at a time."""
    assert packed.data.dim() == 3, "a stack is repacked matrix by matrix"
    rows, columns, copies = _padded(packed.rows), packed.columns, packed.bits // 4
    made = empty(packed.rows, columns, packed.bits)
    step = max(_BLOCK, _SLICE // (copies * columns) // _BLOCK * _BLOCK)
    for first in range(0, rows, step):
        units = packed.data[first // ROWS : (first + step) // ROWS]
        u = _unsigned(units, packed.bits)
        u = F.pad(u, (0, 0, 0, -len(u) % _ROWS))
        made.data[first : first + len(u)] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(u.int(), 1)
    made.scales.copy_(_scales(packed, rows))
    made.row_scales.copy_(F.pad(packed.row_scales, (0, rows - len(packed.row_scales))))
    return made


def _unsigned(units: Tensor, bits: Bits) -> Tensor:
    """What the product takes of whole units, uint8 [R, copies * C]."""
    blocks, across, _ = units.shape
    # 4 bytes of a row are one number here: dimensions block, unit, group, vector, row
    words = units[..., 2 * ROWS :].reshape(blocks, across, 2, bits, ROWS, 4).view(torch.int32)[..., 0]
    words = words.permute(0, 4, 1, 2, 3).contiguous()
    if bits == 4:
        u = torch.stack((words & 0x0F0F0F0F, words >> 4 & 0x0F0F0F0F), dim=-1)
        return u.view(torch.uint8).view(blocks * ROWS, across * COLUMNS)
    q = words.view(torch.uint8).view(blocks * ROWS, across * COLUMNS)
    return torch.cat((q >> 4 ^ 8, q & 15), dim=1)  # two's complement: the sign's 8 turned is the offset added


def _scales(packed: Packed, rows: int) -> Tensor:
    """Scales and zeros, [copies * C / 32, padded rows, 2]."""
    blocks, across, _ = packed.data.shape
    codes = packed.data[..., : 2 * ROWS].reshape(blocks, across, 2, ROWS).view(torch.int8)
    codes = codes.permute(1, 2, 0, 3).reshape(2 * across, blocks * ROWS)
    scale = F.pad(codes, (0, rows - blocks * ROWS)).to(torch.bfloat16)
    zero = torch.zeros_like(scale)
    if packed.bits == 4:
        return torch.stack((scale, zero), dim=-1)
    return torch.cat((torch.stack((16 * scale, zero), dim=-1), torch.stack((scale, 8 * scale), dim=-1)))


def _padded(rows: int) -> int:
    return -(-rows // _ROWS) * _ROWS
