"""Random weights that are quantized from the start: nothing is rounded, so that 12 GB take as long as writing them.

Knows bits and bytes of packed matrices. Knows nothing of geometries or of what else belongs into a folder.
"""

import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ernie_serve.kernels.packed import ROWS, Bits, Packed, empty
from ernie_serve.model.quantize import Shapes, bits_of
from ernie_serve.model.quantized_files import QuantizedWriter
from ernie_serve.model.recipes import Quantization

_SPREAD = {4: 4.61, 8: 73.9}  # standard deviation of evenly spread numbers of so many bits
_CODE = 96.0  # root mean square of the codes below, about


def write_random_packed(
    folder: Path, shapes: Shapes, quantization: Quantization, seed: int, plain: torch.dtype, shard_bytes: int
) -> None:
    """Write the weights of a quantized checkpoint. A parameter depends on its name and the seed alone.

    Products keep the size of what is multiplied (1 / sqrt(inputs)), as those of the plain random weights do.
    """
    bits = bits_of(shapes, quantization)
    with closing(QuantizedWriter(folder, shapes, bits, plain, shard_bytes)) as writer:
        for name, shape in shapes.items():
            chance = np.random.default_rng(zlib.crc32(f"{seed}/{name}".encode()))
            if name not in bits:
                writer.put_plain(name, _plain(name, shape, chance))
                continue
            form = bits[name]
            assert isinstance(form, int), "random weights are made for a CPU"
            if len(shape) == 2:
                writer.put(name, None, random_packed(shape[0], shape[1], form, chance))
                continue
            for expert in range(shape[0]):
                writer.put(name, expert, random_packed(shape[1], shape[2], form, chance))
        writer.finish()


def random_packed(rows: int, columns: int, bits: Bits, chance: np.random.Generator) -> Packed:
    """A matrix of evenly spread numbers, with codes of both signs so that no group has a mean."""
    matrix = empty(rows, columns, bits)
    data = np.frombuffer(bytearray(chance.bytes(matrix.data.nbytes)), np.uint8).reshape(matrix.data.shape)
    codes = data[..., : 2 * ROWS]
    codes[:] = np.where(codes & 128, 64 + codes % 64, 192 - codes % 64)  # 64..127, or -64..-127 as bytes
    if bits == 8:
        body = data[..., 2 * ROWS :]
        body[body == 128] = 0  # -128 is no number of the format
    matrix.data.copy_(torch.from_numpy(data))
    matrix.row_scales.fill_(columns**-0.5 / _SPREAD[bits] / _CODE)
    matrix.row_scales[rows:] = 0
    return matrix


def _plain(name: str, shape: torch.Size, chance: np.random.Generator) -> Tensor:
    values = torch.from_numpy(chance.standard_normal(tuple(shape), np.float32))
    if "norm" in name:
        return values.mul_(0.1).add_(1)
    return values.mul_(0.25 / shape[-1] if "bias" in name else shape[-1] ** -0.5)
