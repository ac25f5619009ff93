"""No operator reads or writes outside of its tensors, nor relies on what C++ leaves undefined."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def runtime() -> str | None:
    """The library that a program with the address sanitizer begins with, where gcc brings one."""
    compiler = os.environ.get("CXX", "g++")
    if sys.platform != "linux" or shutil.which(compiler) is None:
        return None
    path = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


@pytest.mark.timeout(900)  # a compilation; seconds once it is cached
def test_every_operator_passes_the_sanitizers(native):
    library = runtime()
    if library is None:
        pytest.skip("no address sanitizer here")
    environment = os.environ | {
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    script = Path(__file__).with_name("every_operator.py")
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "every operator ran" in ran.stdout
