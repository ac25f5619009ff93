"""Plain bfloat16 matrices in the order that a CPU without instructions for them reads fastest.

Knows the order, in plain torch: this is the definition that `cpu.cpp` reads and writes faster. No number is changed.
Knows nothing of the network, of files, or of which matrices are in panels.

`data` is [rows / 16, columns, 8, 2]: a panel is 16 rows, and for each column it has 8 pairs, row i beside row 8 + i. So
one 256-bit load brings 16 rows their next column, a shift makes floats of the first 8 and a mask of the others. Since
lanes are rows, each output is one sum in the order of the columns, however many tokens there are.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16  # rows


@dataclass(frozen=True, slots=True)
class Panels:
    """One matrix [rows, columns]. Its rows are padded to a multiple of 16 with zeros; `rows` is how many there are."""

    data: Tensor  # bfloat16 [padded rows / 16, columns, 8, 2]
    rows: int

    @property
    def shape(self) -> torch.Size:
        """Of the numbers: [rows, columns]."""
        return torch.Size((self.rows, self.data.shape[1]))

    @property
    def nbytes(self) -> int:
        """Memory of the numbers."""
        return self.data.nbytes

    def numbers(self) -> Tensor:
        """The matrix [rows, columns] in the plain order."""
        return self.data.permute(0, 3, 2, 1).reshape(-1, self.data.shape[1])[: self.rows]

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows of the matrix for `ids` [T]: [T, columns]."""
        return self.data[ids // PANEL, :, ids % 8, ids // 8 % 2]


def pack(weight: Tensor) -> Panels:
    """`weight` [R, C] in panels."""
    rows, columns = weight.shape
    padded = F.pad(weight, (0, 0, 0, -rows % PANEL))
    return Panels(padded.view(-1, 2, 8, columns).permute(0, 3, 2, 1).contiguous(), rows)
