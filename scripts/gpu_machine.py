"""A GPU, or a CPU that stands for one, and what is found on it.

Knows how to wait, to time and to write down. Knows no kernel and no model.
"""

import gc
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ernie_serve.model.loading import FP8_CAPABILITY
from ernie_serve.model.random_checkpoint import GEOMETRIES
from ernie_serve.worker.card import card_of
from ernie_serve.worker.graphs import CudaDevice

TINY: dict[str, Any] = GEOMETRIES["21b"] | {
    "vocab_size": 300, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 5,
    "num_key_value_heads": 1, "head_dim": 16, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 128,
    "moe_num_shared_experts": 1, "max_position_embeddings": 256,
}  # fmt: skip
PAGE = 64


class Machine:
    """Where it runs: the device, and how to wait for it."""

    def __init__(self, dry: bool, layers: int | None = None) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.values = TINY if dry else GEOMETRIES["21b"]
        if layers:
            self.values = self.values | {"num_hidden_layers": layers}

    def recorder(self) -> Any:
        """What records steps; a new one for each model and cache, since the memory of its graphs dies with them."""
        return EagerDevice() if self.dry else CudaDevice()

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def let_go(self) -> None:
        """Give the memory of what is no longer held back."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], object]) -> float:
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began

    @property
    def reads_fp8(self) -> bool:
        return self.dry or torch.cuda.get_device_capability() >= FP8_CAPABILITY

    def rates(self) -> tuple[float, float]:
        """TB/s and TFLOP/s of the floor: as chosen for an H200, of others what reading and one large product reach."""
        if self.dry or torch.cuda.get_device_name() == "NVIDIA H200":
            return 4.3, 790.0
        left, right = (torch.randn(8192, 8192, device=self.device).to(self.dtype) for _ in range(2))
        fastest = min(self.seconds(lambda: left @ right) for _ in range(10))
        return card_of(torch.device("cuda", 0), 1.0).bytes_per_second / 1e12, 2 * 8192**3 / fastest / 1e12

    def kernel_times(self, run: Callable[[], object], steps: int) -> dict[str, list[float]]:
        """Launches and microseconds a step of each kernel that `run` takes, the longest first."""
        if self.dry:
            return {}
        try:
            return self._profiled(run, steps)
        except Exception as error:  # a machine without the profiler still measures
            return {f"{type(error).__name__}: {error}": [0.0, 0.0]}

    def _profiled(self, run: Callable[[], object], steps: int) -> dict[str, list[float]]:
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            self.wait()
            run()
            self.wait()
        found: dict[str, list[float]] = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                entry = found.setdefault(event.name[:60], [0.0, 0.0])
                entry[0] += 1 / steps
                entry[1] += event.device_time_total / steps
        longest = sorted(found.items(), key=lambda item: -item[1][1])[:16]
        return {name: [round(count, 2), round(spent, 1)] for name, (count, spent) in longest}

    def described(self) -> dict[str, Any]:
        found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
        found |= {"triton": triton.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
        if not self.dry:
            properties = torch.cuda.get_device_properties(0)
            found |= {"gpu": properties.name, "gpu_gib": round(properties.total_memory / 2**30, 1)}
            found |= {"cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability(0)}
        return found


class EagerDevice:
    """Records nothing and runs everything: what a graph has to agree with, bit for bit."""

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def record(self, run: Callable[[], None]) -> Callable[[], object]:
        return run

    def read(self, tensor: Tensor) -> Callable[[], list[int]]:
        return tensor.clone().tolist


class Report:
    """What is found, and how much time is left to find more."""

    def __init__(self, minutes: float) -> None:
        self._ends = time.monotonic() + 60 * minutes
        self.values: dict[str, Any] = {"points": [], "kernels": [], "left_out": [], "failed": []}

    def part(self, name: str, needs_seconds: float, run: Callable[[], None]) -> None:
        """Run a part if there is time for it; a part that fails is told, and the others go on."""
        left = self._ends - time.monotonic()
        if left < needs_seconds:
            self.values["left_out"].append(f"{name}: needs about {needs_seconds:.0f} s, {max(0, left):.0f} were left")
            return
        print(f"== {name} ({left:.0f} s left)", flush=True)
        try:
            run()
        except torch.OutOfMemoryError as error:  # a smaller card than the H200 that the parts are sized for
            self.values["left_out"].append(f"{name}: has no room: {str(error).splitlines()[0][:200]}")
            print("   left out: it has no room here", flush=True)
        except Exception as error:
            self.values["failed"].append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            print(f"   FAILED {type(error).__name__}: {error}", flush=True)

    def point(self, name: str, tokens: int, seconds: float, floor: float, **more: Any) -> None:
        found = {"name": name, "tok_s": four_digits(tokens / seconds), "ms": round(1e3 * seconds, 3)}
        self.values["points"].append(found | {"share": four_digits(floor / seconds)} | more)
        print(
            f"   {name:24} {found['tok_s']:>10} tok/s {found['ms']:>10} ms  {100 * floor / seconds:5.1f} %", flush=True
        )

    def compared(self, name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
        """One kernel's result beside the reference: the largest error over the largest value."""
        error = float((got.float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1e-9))
        is_right = error <= tolerance  # not a number is not right
        self.values["kernels"].append({"name": name, "error": error, "tolerance": tolerance, "right": is_right})
        if not is_right:
            self.values["failed"].append(f"kernel {name}: relative error {error:.3g}, at most {tolerance} is right")
            print(f"   WRONG {name}: {error:.3g}", flush=True)


def four_digits(value: float) -> float:
    return float(f"{value:.4g}")
