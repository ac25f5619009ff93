"""What every launch has to know of where it runs.

Knows Triton's interpreter: it keeps bfloat16 as integers, so that a dot of such operands is wrong there. Kernels
therefore compute on float32 as soon as a value is loaded, and take the compile-time switch `UPCAST` for their dots.
"""

import functools
import os

import torch
import triton
import triton.language as tl

UPCAST = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether operands of a dot are made float32 first; on a GPU that would be slow for nothing."""


@triton.jit
def dot(x, w, acc, UPCAST: tl.constexpr):
    """`acc` + `x` [m, k] by `w` [k, n], which may be of 8 bits; the sum is float32."""
    if UPCAST:
        acc += tl.dot(x.to(tl.float32), w.to(tl.float32), input_precision="ieee")
    else:
        acc = tl.dot(x, w.to(x.dtype), acc=acc, input_precision="ieee")
    return acc


LARGE_TILES = 160 << 10
"""Bytes of shared memory that the largest tiles take."""


@functools.cache
def has_large_tiles(device: torch.device) -> bool:
    """Whether a processor of this device has room for the largest tiles, as those of an A100, H100 and H200 have."""
    if device.type != "cuda":
        return True
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= LARGE_TILES


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; of anything but a GPU an H200's 132, whose choices are tested."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def power_of_two(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << max(0, n - 1).bit_length()
