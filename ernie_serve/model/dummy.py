"""A checkpoint folder whose weights nobody has: numbers by chance, in the places of the real ones, at once.

Knows what a file of tensors is asked for. Knows nothing of what the tensors mean, but that a norm is 1 and a router's
bias 0. Everything beside the numbers is as with real weights, so speed and memory are, too: for measuring.

Chance is drawn once, 16 million numbers (normal, 0.02), and each tensor begins elsewhere in them.
"""

import math
from pathlib import Path
from types import TracebackType
from typing import cast

import torch
from torch import Tensor

from ernie_serve.model.config import ModelConfig
from ernie_serve.model.quantize import parameter_shapes
from ernie_serve.model.safetensors_file import SafetensorsFile, StoredTensor
from ernie_serve.model.weights import tensors_of

_NUMBERS = 1 << 24
_SCALE = 0.02
_STRIDE = 1_000_003 * 2  # bytes between the beginnings of two tensors: a prime of numbers, so that none begins alike


class DummyShards:
    """What `Shards` is for files: the tensors of a checkpoint by name, of bfloat16 numbers. Also a context manager."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        chance, ones, zeros = _Numbers(_normal()), _Numbers(torch.ones(4096)), _Numbers(torch.zeros(4096))
        self.tensors: dict[str, StoredTensor] = {}
        for name, place in tensors_of(parameter_shapes(config), "-PT"):
            numbers = ones if "norm" in name else zeros if "bias" in name else chance
            # a file in all that is asked of one here
            file, size = cast("SafetensorsFile", numbers), 2 * math.prod(place.shape)
            self.tensors[name] = StoredTensor(file, name, "BF16", place.shape, len(self.tensors) * _STRIDE, size)

    def __enter__(self) -> "DummyShards":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Nothing is open."""


class _Numbers:
    """Endless bytes that repeat."""

    path = Path("dummy weights")

    def __init__(self, numbers: Tensor) -> None:
        self._bytes = numbers.to(torch.bfloat16).view(torch.uint8)

    def read_into(self, memory: Tensor, start: int) -> None:
        """Fill contiguous CPU `memory` with the bytes from `start` on."""
        target, size = memory.view(-1).view(torch.uint8), len(self._bytes)
        done = 0
        while done < len(target):
            at = (start + done) % size
            count = min(size - at, len(target) - done)
            target[done : done + count] = self._bytes[at : at + count]
            done += count


def _normal() -> Tensor:
    return torch.randn(_NUMBERS, generator=torch.Generator().manual_seed(0)) * _SCALE
