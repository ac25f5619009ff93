"""Tile sizes of the expert kernels by the number of tokens and the format of the weights.

For 64 experts of width 1536 and a hidden size of 2560, measured on an H200 at 1 to 256 tokens, and in 16 bit at 512
and 1,024, as `scripts/gpu_tiles` does it; the others, and those of cards with less shared memory, are starting points.
"""

from dataclasses import dataclass, replace
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


def tile_for(
    kernel: Literal["gate_up", "down"], num_tokens: int, format: str, small: bool = False, wide: bool = False
) -> Tile:
    """The tile for so many tokens; of int4 a step is always 128 deep, as its units are. `small` is for 99 KiB.

    `wide` is for numbers of 32 bits, of which a step has half the depth, or of int4 half the columns.
    """
    tile = _tile(kernel, num_tokens, format, small)
    if not wide:
        return tile
    return replace(tile, columns=tile.columns // 2) if format == "int4" else replace(tile, depth=tile.depth // 2)


def _tile(kernel: Literal["gate_up", "down"], num_tokens: int, format: str, small: bool) -> Tile:
    if num_tokens <= 64:
        columns = 32 if kernel == "gate_up" else 64
        if format == "int4":
            return Tile(16, columns, 128, warps=2, stages=4)
        if format == "row":
            return Tile(16, columns, 256, warps=4, stages=4 if num_tokens <= 16 else 3)
        return Tile(16, columns, 128, warps=4, stages=3)
    if num_tokens <= 256:
        return Tile(32, 64 if kernel == "gate_up" else 128, 128, warps=4, stages=3)
    if format == "int4":  # a half's product lies beside the sums: of larger tiles the compiler keeps both in memory
        if kernel == "down":
            return Tile(64, 128, 128, warps=8, stages=3)
        return Tile(64, 32, 128, warps=4, stages=3) if small else Tile(64, 64, 128, warps=8, stages=3)
    rows = 64 if small or num_tokens <= (640 if format == "plain" else 1024) else 128
    columns = 64 if kernel == "gate_up" and (small or format == "plain") else 128
    return Tile(rows, columns, 64, warps=8 if rows == 128 else 4, stages=3)
