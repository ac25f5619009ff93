"""Prints which kernels, at which compile-time settings, prompts find that a start has not found: one a line, no GPU.

A launch is recorded, not made, on meta tensors of the real geometry, as `compile_all.py` does.
"""

from collections.abc import Iterable
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from ernie_serve.engine_process import _PROMPTS
from ernie_serve.kernels.cuda import CudaKernels
from ernie_serve.kernels.quantized import quantize
from ernie_serve.worker.graphs import BUCKETS

N, E, A, WIDTH, MAX_NUM_SEQS = 2560, 64, 6, 1536, 64
found: set[str] = set()


def noted(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
    given = dict(zip(kernel.arg_names, args, strict=False)) | named
    key = {name: value for name, value in given.items() if not isinstance(value, torch.Tensor | float)}
    for param in kernel.params:
        if param.name in key and not param.is_constexpr:
            number = key.pop(param.name)
            if not param.do_not_specialize:
                key[param.name] = (number == 1, number % 16 == 0)
    found.add(f"{kernel.fn.__name__} {sorted(key.items(), key=str)}")


JITFunction.run = noted
torch.set_default_device("meta")
kernels = CudaKernels()
weight, bias = torch.empty(E, N), torch.empty(E)
shapes = ((E, 2 * WIDTH, N), (E, N, WIDTH), (4 * WIDTH, N), (N, 2 * WIDTH))
plain = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
narrow = [quantize(each, "int8") for each in plain]


def keys(matrices: list[Any], lengths: Iterable[int]) -> set[str]:
    """What steps of so many tokens launch; each format by itself, since a server has one."""
    found.clear()
    gate_up, down, *shared = matrices
    for tokens in lengths:
        x = torch.empty(tokens, N, dtype=torch.bfloat16)
        kernels.moe(x, weight, bias, A, 1e-12, gate_up, down, tuple(shared))
    return set(found)


num_known = 0
for matrices in (plain, narrow):
    known = keys(matrices, (*_PROMPTS, *(bucket for bucket in BUCKETS if bucket <= MAX_NUM_SEQS)))
    for each in sorted(keys(matrices, (*range(17, 1600), *range(1600, 8193, 61))) - known):
        print(each)
    num_known += len(known)
print(f"{num_known} known")
