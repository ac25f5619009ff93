"""The 4-bit and 8-bit weight format: what a packed matrix is, and both ways between it and numbers.

Knows layout and rounding, in plain torch: this is the definition that `cpu.cpp` reads and writes faster. Knows nothing
of the network, of files, or of which matrices are packed.

A weight is row_scale[row] * code[row, group] * q[row, column], a group being 32 columns. `row_scale` is a float32,
`code` an int8 of either sign, so that the largest value of a group may use the longer negative end of 4 bits, and
`q` is -8..7 (4 bits) or -127..127 (8 bits): 4.25 or 8.25 bits a weight, and 4 bytes a row.

`data` is [rows / 8, columns / 64, unit]. A unit is 8 rows by 64 columns, two groups:

    16 bytes   codes: 8 rows of the first group, 8 rows of the second
    then, for the first group and then the second, vectors of 32 bytes, 4 bytes for each of the 8 rows:
       4 bits  4 vectors; low nibbles of vector i are columns 8i..8i+3 of the group, plus 8, high ones 8i+4..8i+7
       8 bits  8 vectors; vector i is columns 4i..4i+3 of the group

so one 256-bit load brings 8 rows their next columns. A stack of matrices has a dimension before these.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ernie_serve.errors import SettingsError

Bits = Literal[4, 8]

GROUP = 32
ROWS = 8  # of a unit; its columns are two groups
COLUMNS = 2 * GROUP
DIVISORS = (7.1, 7.4, 7.7, 8.0, 8.3, 8.6, 8.9)
"""Candidates of a 4-bit scale: the largest magnitude of the group over each of these, with either sign.

On normal weights the relative error is 0.0816; trying every code gives 0.0811, the largest over 7 alone 0.0971.
"""


@dataclass(frozen=True, slots=True)
class Packed:
    """One matrix [rows, columns], or a stack of them with a dimension E before.

    Its rows are padded to a multiple of 8 with zeros; `rows` is how many there really are.
    """

    data: Tensor  # uint8 [.., padded rows / 8, columns / 64, unit]
    row_scales: Tensor  # float32 [.., padded rows]
    bits: Bits
    rows: int
    handed: tuple[Tensor, Tensor, int] = field(init=False, repr=False, compare=False)
    """How an operator is handed it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "handed", (self.data, self.row_scales, self.bits))

    @property
    def columns(self) -> int:
        """Columns of a matrix."""
        return self.data.shape[-2] * COLUMNS

    @property
    def shape(self) -> torch.Size:
        """Of the numbers: [rows, columns], or [E, rows, columns]."""
        return torch.Size((*self.data.shape[:-3], self.rows, self.columns))

    @property
    def nbytes(self) -> int:
        """Memory of data and scales."""
        return self.data.nbytes + self.row_scales.nbytes

    def __getitem__(self, expert: int) -> "Packed":
        """One matrix of a stack, sharing its memory."""
        assert self.data.dim() == 4, "only a stack has members"
        return Packed(self.data[expert], self.row_scales[expert], self.bits, self.rows)

    def __len__(self) -> int:
        """Matrices of a stack."""
        assert self.data.dim() == 4, "only a stack has members"
        return len(self.data)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers, [.., rows, columns]."""
        q, codes = unpack(self)
        scales = codes.float() * self.row_scales[..., : self.rows, None]
        return (q.float() * scales.repeat_interleave(GROUP, dim=-1)).to(dtype)


def padded(rows: int) -> int:
    """Rows that a matrix takes: a multiple of 8."""
    return -(-rows // ROWS) * ROWS


def unit_bytes(bits: Bits) -> int:
    """Bytes of 8 rows by 64 columns with their codes."""
    return 2 * ROWS + ROWS * COLUMNS * bits // 8


def require_packable(columns: int, name: str = "A matrix") -> None:
    """Raise `SettingsError` unless rows of so many columns are whole units."""
    if columns % COLUMNS:
        raise SettingsError(
            f"{name} has {columns} columns; 4-bit and 8-bit weights need a multiple of {COLUMNS}. "
            "Serve this checkpoint without --quantization."
        )


def empty(rows: int, columns: int, bits: Bits) -> Packed:
    """A matrix whose memory is to be filled."""
    require_packable(columns)
    data = torch.empty((padded(rows) // ROWS, columns // COLUMNS, unit_bytes(bits)), dtype=torch.uint8)
    return Packed(data, torch.empty(padded(rows), dtype=torch.float32), bits, rows)


def pack(q: Tensor, codes: Tensor, row_scales: Tensor, bits: Bits) -> Packed:
    """From `q` [.., R, C] and `codes` [.., R, C / 32], both int8, and `row_scales` [.., R]."""
    *stack, rows, columns = q.shape
    require_packable(columns)
    if extra := padded(rows) - rows:
        q, codes = (torch.nn.functional.pad(x, (0, 0, 0, extra)) for x in (q, codes))
        row_scales = torch.nn.functional.pad(row_scales, (0, extra))
    n, blocks, units = len(stack), padded(rows) // ROWS, columns // COLUMNS
    front = tuple(range(n))

    def ordered(x: Tensor, parts: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
        return x.reshape(*stack, *parts).permute(*front, *(n + i for i in order)).contiguous()

    # dimensions: 0 block, 1 row, 2 unit, 3 group of the unit, then of the group: 4 vector, 5 nibble or byte, 6 byte
    codes = ordered(codes, (blocks, ROWS, units, 2), (0, 2, 3, 1)).view(torch.uint8).flatten(-2)
    if bits == 4:
        halves = ordered(q + 8, (blocks, ROWS, units, 2, 4, 2, 4), (0, 2, 3, 4, 1, 6, 5)).view(torch.uint8)
        body = (halves[..., 0] | halves[..., 1] << 4).flatten(-4)
    else:
        body = ordered(q, (blocks, ROWS, units, 2, 8, 4), (0, 2, 3, 4, 1, 5)).view(torch.uint8).flatten(-4)
    return Packed(torch.cat((codes, body), dim=-1), row_scales.float(), bits, rows)


def unpack(packed: Packed) -> tuple[Tensor, Tensor]:
    """`q` [.., R, C] and `codes` [.., R, C / 32], both int8: the way back from `pack`."""
    *stack, blocks, units, _ = packed.data.shape
    n = len(stack)
    front = tuple(range(n))

    def ordered(x: Tensor, parts: tuple[int, ...], order: tuple[int, ...], columns: int) -> Tensor:
        turned = x.reshape(*stack, blocks, units, *parts).permute(*front, *(n + i for i in order))
        return turned.reshape(*stack, blocks * ROWS, columns)[..., : packed.rows, :].contiguous()

    codes, body = packed.data[..., : 2 * ROWS].view(torch.int8), packed.data[..., 2 * ROWS :]
    codes = ordered(codes, (2, ROWS), (0, 3, 1, 2), units * 2)
    if packed.bits == 4:
        q = torch.stack((body & 15, body >> 4), dim=-1).to(torch.int8) - 8
        return ordered(q, (2, 4, ROWS, 4, 2), (0, 4, 1, 2, 3, 6, 5), units * COLUMNS), codes
    return ordered(body.view(torch.int8), (2, 8, ROWS, 4), (0, 4, 1, 2, 3, 5), units * COLUMNS), codes


def quantize(weight: Tensor, bits: Bits, search: bool = True) -> Packed:
    """The packed matrix nearest to `weight` [.., R, C], a few million numbers at a time.

    With `search`, each 4-bit group takes of several scales the one with the least squared error, its code being
    rounded already. Without it, and with 8 bits, the largest magnitude of a group decides: over 7, over 127.
    """
    if weight.dim() == 3:
        members = [quantize(matrix, bits, search) for matrix in weight]
        data, scales = (torch.stack([getattr(each, name) for each in members]) for name in ("data", "row_scales"))
        return Packed(data, scales, bits, weight.shape[1])
    rows = max(ROWS, _SLICE // weight.shape[1] // ROWS * ROWS)
    parts = [_quantize_rows(part.float(), bits, search) for part in torch.split(weight, rows)]
    data, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("data", "row_scales"))
    return Packed(data, scales, bits, weight.shape[0])


_SLICE = 1 << 22  # numbers at once: the search keeps several float copies of them


def _quantize_rows(weight: Tensor, bits: Bits, search: bool) -> Packed:
    groups = weight.view(len(weight), -1, GROUP)  # [R, G, 32]
    largest = groups.abs().amax(-1)
    top = 7 if bits == 4 else 127
    row_scales = largest.amax(-1) / top / 127
    inverse = torch.where(row_scales > 0, 1 / row_scales, 0)[:, None]
    best_codes = (largest / top * inverse).round()
    best_q = _rounded(groups, best_codes * row_scales[:, None], bits)
    if bits == 4 and search:
        best_error = _error(groups, best_codes * row_scales[:, None], best_q)
        for divisor in DIVISORS:
            for sign in (1, -1):
                codes = (largest / (sign * divisor) * inverse).round()
                scales = codes * row_scales[:, None]
                q = _rounded(groups, scales, bits)
                error = _error(groups, scales, q)
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best_codes = torch.where(better, codes, best_codes)
                best_q = torch.where(better[..., None], q, best_q)
    return pack(best_q.to(torch.int8).view(weight.shape), best_codes.to(torch.int8), row_scales, bits)


def _rounded(groups: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    inverse = torch.where(scales != 0, 1 / scales, 0)[..., None]
    return (groups * inverse).round().clamp(*((-8, 7) if bits == 4 else (-127, 127)))


def _error(groups: Tensor, scales: Tensor, q: Tensor) -> Tensor:
    return (groups - q * scales[..., None]).square().sum(-1)
