"""No prompt waits for the compiler of router and experts, which differ most by its length: a start has found them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_the_prompts_of_a_start_find_the_kernels_of_every_length():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("launch_keys.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *unknown, known = done.stdout.splitlines()
    assert unknown == []
    assert int(known.split()[0]) > 20
