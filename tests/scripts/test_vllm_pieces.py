"""What is packed comes out again where gpu_compare looks for it; pip is a stand-in that brings a vLLM of noise."""

import argparse
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import gpu_compare  # scripts are no package of ours

ROOT = Path(__file__).parents[2]
PIP = """#!/usr/bin/env bash
[ "$3" = install ] || exit 0
while [ "$1" != --target ]; do shift; done
cp -r "$NOISE" "$(mkdir -p "$(dirname "$2")" && echo "$2")"
"""
TILES = "vllm/model_executor/layers/fused_moe/configs/E=64,N=1536,device_name=NVIDIA_H100_80GB_HBM3.json"

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("xz", "sha256sum", "split"))), reason="needs xz and split")


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    noise = tmp_path / "noise"
    for name in ("vllm/_C.so", "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", TILES):
        (noise / name).parent.mkdir(parents=True, exist_ok=True)
        (noise / name).write_bytes(random.Random(name).randbytes(5 << 19))
    python = tmp_path / "python"
    python.write_text(PIP)
    python.chmod(0o755)
    environ = os.environ | {"PYTHON": str(python), "NOISE": str(noise)}
    subprocess.run(["scripts/vllm_pieces", str(tmp_path / "pieces"), "1"], cwd=ROOT, check=True, env=environ)
    return tmp_path / "pieces"


def unpack(pieces: Path, place: Path) -> "subprocess.CompletedProcess[str]":
    environ = os.environ | {"PYTHON": sys.executable}
    return subprocess.run([pieces / "unpack", place], capture_output=True, text=True, env=environ)


def test_small_pieces_come_out_as_an_installation(
    pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [piece.stat().st_size for piece in sorted(pieces.glob("vllm.tar.xz.*"))]
    assert len(sizes) == 6
    assert max(sizes) == 1 << 20, "no piece is larger than asked, and none smaller but the last"
    assert unpack(pieces, tmp_path / "place").returncode == 0
    site = tmp_path / "place/lib/python3.12/site-packages"
    assert (site / "vllm/_C.so").read_bytes() == (tmp_path / "noise/vllm/_C.so").read_bytes()
    assert not list(site.rglob("_vllm_fa2_C*"))
    monkeypatch.setattr(gpu_compare, "_output", lambda *command: "NVIDIA H200")
    args = argparse.Namespace(vllm=str(tmp_path / "place/bin/vllm"), theirs=None, out=tmp_path / "out.json")
    folder = gpu_compare.tuned_tiles(args, {"moe_num_experts": 64, "moe_intermediate_size": 1536})
    assert os.listdir(folder) == ["E=64,N=1536,device_name=NVIDIA_H200.json"]


def test_a_piece_that_came_over_broken_is_named(pieces: Path, tmp_path: Path) -> None:
    broken = pieces / "vllm.tar.xz.01"
    broken.write_bytes(b"\0" + broken.read_bytes()[1:])
    done = unpack(pieces, tmp_path / "place")
    assert done.returncode != 0
    assert "vllm.tar.xz.01: FAILED" in done.stdout
    assert not (tmp_path / "place/bin").exists()


def test_what_lies_there_is_left_alone(pieces: Path) -> None:
    done = subprocess.run(["scripts/vllm_pieces", pieces], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"{pieces} is not empty.\n")
