"""How idle threads wait, what oneDNN may remember, and what that saves a process that multiplies in many shapes."""

import os
import subprocess
import sys

import pytest
import torch

from ernie_serve.worker.environment import prepare

_GROWTH = """
import torch
from ernie_serve.kernels.cpu import CpuKernels

def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

kernels, weights = CpuKernels(), [torch.randn(32 * n, 64) for n in (1, 2, 3)]
kernels.linear(torch.randn(1, 64), weights[0])
before = held()
for rows in range(2, 402):
    for weight in weights:
        kernels.linear(torch.randn(rows, 64), weight)
print(held() - before)
"""


def test_what_somebody_has_set_is_kept() -> None:
    environ: dict[str, str] = {}
    prepare(environ)
    assert set(environ) == {"GOMP_SPINCOUNT", "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    assert 1000 <= int(environ["GOMP_SPINCOUNT"]) <= 100_000
    for said in (
        {"GOMP_SPINCOUNT": "7", "LRU_CACHE_CAPACITY": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9"},
        {"OMP_WAIT_POLICY": "active", "LRU_CACHE_CAPACITY": "7", "DNNL_PRIMITIVE_CACHE_CAPACITY": "9"},
    ):
        kept = dict(said)
        prepare(kept)
        assert kept == said


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_products_in_many_shapes_take_little_memory() -> None:
    environ = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    kib = {}
    for name in ("by itself", "bounded"):
        if name == "bounded":
            prepare(environ)
        ran = subprocess.run([sys.executable, "-c", _GROWTH], env=environ, capture_output=True, text=True, check=True)
        kib[name] = int(ran.stdout)
    assert kib["bounded"] < max(0.6 * kib["by itself"], 50_000), kib  # where little is remembered anyway
