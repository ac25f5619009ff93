"""A GPU as it describes itself: its name, its memory, and how fast it reads that.

Knows torch's view of a device. Knows nothing of checkpoints.
"""

import time
from dataclasses import dataclass

import torch

from ernie_serve.model.loading import FP8_CAPABILITY
from ernie_serve.worker.memory import GIB


@dataclass(frozen=True, slots=True)
class Card:
    """What a GPU has. `bytes_per_second` is measured, or of its data sheet, or 0 where neither is known."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    bytes_per_second: float
    is_measured: bool

    @property
    def reads_fp8(self) -> bool:
        """Whether kernels for fp8 compile for it."""
        return self.capability >= FP8_CAPABILITY


def card_of(device: torch.device, seconds: float) -> Card:
    """Ask a GPU, and read its memory for so long, if enough of it is free to be more than its cache."""
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    is_measured = free > GIB
    return Card(
        properties.name,
        total,
        free,
        torch.cuda.get_device_capability(device),
        _measured(device, seconds) if is_measured else _nominal(properties),
        is_measured,
    )


def _measured(device: torch.device, seconds: float) -> float:
    """Bytes a second, the median of many passes over half a GiB."""
    block = torch.ones(GIB // 16, dtype=torch.int64, device=device)
    passes: list[float] = []
    end = time.monotonic() + seconds
    while not passes or time.monotonic() < end:
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        block.sum()
        torch.cuda.synchronize(device)
        passes.append(block.nbytes / (time.perf_counter() - began))
    return sorted(passes)[len(passes) // 2]


def _nominal(properties: object) -> float:
    """Two bits a clock on each wire, where torch tells clock and width."""
    kilohertz, width = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    return 2.0 * kilohertz * 1000 * width / 8
