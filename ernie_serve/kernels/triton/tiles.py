"""Tile sizes of the expert kernels by the number of tokens.

Starting points for 64 experts of width 1536 and a hidden size of 2560, from what others have tuned for an H100; on an
H200 not measured yet.
"""

from dataclasses import dataclass
from typing import Literal

from ernie_serve.kernels.triton.launching import power_of_two


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows, columns and depth of a program's tile, its warps, and how many loads are in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self, width: int) -> dict[str, int]:
        """What a launch is given, for rows of `width` numbers."""
        return {
            "BM": self.rows,
            "BN": self.columns,
            "BK": max(16, min(self.depth, power_of_two(width))),
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def tile_for(kernel: Literal["gate_up", "down"], num_tokens: int, format: str) -> Tile:
    """The tile for so many tokens; of int4 a step is always 128 deep, as its units are."""
    rows = 16 if num_tokens <= 64 else 32 if num_tokens <= 192 else 64 if num_tokens <= 1024 else 128
    columns = 32 if kernel == "gate_up" and rows == 16 else 64 if rows <= 32 else 128
    depth = 128 if rows <= 32 or format == "int4" else 64
    return Tile(rows, columns, depth, warps=8 if rows == 128 else 4, stages=4 if rows <= 32 else 3)
