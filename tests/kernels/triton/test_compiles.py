"""Every kernel is compiled for an H200 and an A100, which needs no GPU: types and shared memory show here.

In a process of its own, since here the interpreter is on. At the real geometry: hidden 2560, width 1536, 64 experts.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from ernie_serve.kernels.triton.launching import LARGE_TILES

SMALL_TILES = 99 << 10  # bytes of shared memory, as cards of 24 GB have
STREAMING = ("_attend", "_gate_up", "_down", "_linear", "_scores")  # they are as fast as the loads they have under way
IN_REGISTERS = ("_one_row", "_sum_down")  # they ask for all that they read at once
COMPILE = Path(__file__).with_name("compile_all.py")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("capability", "num_formats", "num_streaming"), [("80", 3, 19), ("90", 4, 26)])
def test_every_kernel_compiles_and_fits_a_processor(tmp_path, capability, num_formats, num_streaming):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(COMPILE), capability], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.rsplit(" ", 4) for line in done.stdout.splitlines()]
    sizes = {name: size for name, size, *_ in lines}
    assert len(sizes) >= 12
    assert max(map(int, sizes.values())) <= LARGE_TILES
    large = {name.split("-")[0] for name, size in sizes.items() if int(size) > SMALL_TILES}
    assert large <= {"_linear", "_gate_up"}, "which a card with less has not, or with a smaller tile"
    assert sum(name.startswith("float32 ") for name in sizes) >= 10, "which is no faster, but has to fit as well"
    streaming = [int(loads) for name, _, loads, *_ in lines if name.removeprefix("small ").startswith(STREAMING)]
    assert len(streaming) >= num_streaming
    assert min(streaming) > 0, "the compiler no longer fetches ahead"
    of_int4 = {
        name: int(spilled)
        for name, *_, spilled, _ in lines
        if name.removeprefix("small ").startswith(("_gate_up-int4", "_down-int4"))
    }
    assert len(of_int4) >= 7
    # an A100 has the tile of gate and up that suits an H200
    most = {name: 512 if capability == "80" and name.startswith("_gate_up-int4-64") else 8 for name in of_int4}
    assert all(spilled <= most[name] for name, spilled in of_int4.items()), f"sums are kept in memory: {of_int4}"
    in_registers = [line for line in lines if line[0].startswith(IN_REGISTERS)]
    assert len(in_registers) >= 4 * num_formats, "those of one row"
    assert max(int(spilled) for *_, spilled, _ in in_registers) <= 8, "what is on its way no longer fits"
    asked = [int(asked) for name, *_, asked in in_registers if name.startswith("_one_row")]
    assert min(asked) >= 5, "something is waited for before the matrix is asked for"
    small = sum(name.startswith(("small _gate_up", "small _down")) for name in sizes)
    assert small == 2 * num_formats - 3, "both of plain and down of int4 have the same tile on all cards"
