"""Which GPU there is, and how it describes itself: its name, its memory, and how fast it reads that.

Knows torch's view of a device. Knows nothing of checkpoints.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ernie_serve.errors import DeviceLost, SettingsError, StartupError
from ernie_serve.model.loading import FP8_CAPABILITY
from ernie_serve.worker.memory import GIB

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 0)
"""The least compute capability (Ampere) that multiplies bfloat16."""


def device_of(wanted: str, root: Path = Path("/")) -> torch.device:
    """The device of a setting's word, of several GPUs the first. Raises `SettingsError` for one that is not there.

    Where none is named and there is a GPU that PyTorch does not see, a warning says so.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if wanted != "auto":
            raise SettingsError(f"--device {wanted}: PyTorch sees no GPU. {_why_none()} Or use --device cpu.")
        if (root / "proc/driver/nvidia").exists():
            logger.warning(
                "This machine has an NVIDIA driver, but PyTorch sees no GPU, so the CPU serves. %s "
                "If the CPU is meant, say --device cpu.",
                _why_none(),
            )
        return torch.device("cpu")
    index, count = int(wanted.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise SettingsError(f"--device {wanted}: PyTorch sees {count} GPU{'s' * (count > 1)}. Use {there}.")
    return torch.device("cuda", index)


def _why_none() -> str:
    """Why PyTorch sees no GPU, and what to do about it."""
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]  # torch does not type it
        return "It is built without CUDA: install a CUDA build."
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch does not type it
    except Exception as error:  # of several kinds, each of which says what lacks
        told = " ".join(str(error).split()).rstrip(".")
        return (
            f"It says: {told}. It is built for CUDA {torch.version.cuda}, whose driver `nvidia-smi` has to show; a "
            "container needs --gpus all; CUDA_VISIBLE_DEVICES may hide what there is."
        )
    return "Look at `nvidia-smi` and CUDA_VISIBLE_DEVICES."


def take(device: torch.device) -> None:
    """Make a GPU the current one of this thread. Raises `StartupError` for one that is full, or another's alone."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.set_device(device)
        torch.cuda.mem_get_info(device)
    except RuntimeError as error:  # which every error of CUDA is
        told = str(error).partition("\n")[0].rstrip(".")
        raise StartupError(
            f"{device} cannot be used: {told}. `nvidia-smi` shows what else uses it; end that, or name another GPU."
        ) from error


def named(device: torch.device) -> str:
    """A device as a person knows it: torch counts GPUs from the fastest on, which `nvidia-smi` does not."""
    return f"{torch.cuda.get_device_name(device)} ({device})" if device.type == "cuda" else str(device)


@contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Within this, what names no GPU means `device`: streams, events and Triton's launches. Each thread has its own.

    Raises `DeviceLost` for what fails within it and leaves a GPU that answers nothing any more.
    """
    if device.type != "cuda":
        yield
        return
    try:
        with torch.cuda.device(device):  # which may itself raise on coming to a GPU that is lost, or leaving it
            yield
    except Exception as error:
        if _is_lost(device):
            told = str(error).partition("\n")[0].rstrip(".")
            raise DeviceLost(f"{device} is lost: {told}. Only a new process can use it again.") from error
        raise


def _is_lost(device: torch.device) -> bool:
    """Whether a GPU gives an error whatever is asked, as after an access beyond its memory."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:  # which every error of CUDA is
        return True
    return False


def require_kernels(name: str, capability: tuple[int, int]) -> None:
    """Raise `SettingsError` for a GPU that our kernels are not compiled for, before anything is read for it."""
    if capability < LEAST_CAPABILITY:
        raise SettingsError(
            f"{name} has compute capability {_dotted(capability)}; the kernels need {_dotted(LEAST_CAPABILITY)} or "
            "more (Ampere and newer), because the numbers are bfloat16. Use another GPU, or --device cpu."
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@dataclass(frozen=True, slots=True)
class Card:
    """What a GPU has. `bytes_per_second` is measured, or of its data sheet, or 0 where neither is known."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    bytes_per_second: float
    is_measured: bool

    def usable_bytes(self, utilization: float) -> int:
        """What is free beside the share of the whole that is to be kept free."""
        return max(0, self.free_bytes - int(self.total_bytes * (1 - utilization)))

    @property
    def has_kernels(self) -> bool:
        """Whether our kernels compile for it at all."""
        return self.capability >= LEAST_CAPABILITY

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
