"""The script for a GPU machine, with all of its logic, on a CPU: tiny geometry, Triton's interpreter, no graph."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
QUICKLY = """
import sys
from kernels.triton.interpreting import without_idle_work
import gpu_check
with without_idle_work():
    sys.exit(gpu_check.main(sys.argv[1:]))
"""


@pytest.mark.timeout(900)
def test_a_dry_run_finds_every_kernel_right_and_writes_its_points(tmp_path):
    out = tmp_path / "found.json"
    folders = (ROOT, ROOT / "scripts", ROOT / "tests")
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", QUICKLY, "--dry", "--minutes", "12", "--out", str(out)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert found["failed"] == [], done.stderr[-2000:]
    assert done.returncode == 0
    assert found["graph_equals_eager"] is True
    assert all(kernel["right"] for kernel in found["kernels"])
    names = [point["name"] for point in found["points"]]
    assert names == [
        "decode_b1_0k",
        "decode_b2_0k",
        "decode_b1_0k_apart",
        "decode_b1_0k_kv8",
        "decode_b1_0k_top_p",
        "prefill_0k",
        "decode_b1_0k_fp8",
        "decode_b1_0k_fp8_apart",
        "decode_b1_0k_fp8_kv8",
        "decode_b1_0k_int8",
        "decode_b1_0k_int4",
    ]
    assert all(point["share"] > 0 and point["tok_s"] > 0 for point in found["points"])
    assert all(point["experts_a_layer"] >= 2 for point in found["points"] if "decode" in point["name"])
    assert found["left_out"] == []
    assert {each["kernel"] for each in found["ways"] if each["us"] > 0} == {"qkv", "o", "down", "scores"}
    assert set(found["files"]) == {"plain", "int8"}
    assert [each["tokens"] for each in found["new_lengths"]] == [19, 21]
    assert found["short_prompts"]["ms"] > 0
    assert [(each["target"], each["concurrency"]) for each in found["http"]] == [("engine", 1), ("http", 1)]
    assert all(each["ttft_ms_p50"] > 0 for each in found["http"])


def test_what_no_longer_fits_is_left_out_by_name(tmp_path):
    out = tmp_path / "found.json"
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, str(ROOT / "scripts/gpu_check.py"), "--dry", "--minutes", "0", "--out", str(out)],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=True,
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert found["points"] == []
    assert any(part.startswith("kernels: needs") for part in found["left_out"])
