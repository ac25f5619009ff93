"""`ernie-serve quantize` and what is served of it, as a user has them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie_serve import cli
from ernie_serve.bundled import ERNIE_TINY
from ernie_serve.config import Settings
from ernie_serve.engine_process import build_engine
from ernie_serve.errors import NotEnoughMemory, SettingsError
from ernie_serve.kernels import fused, nibbles
from ernie_serve.messages import EngineRequest, SamplingParams
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.quantize import copying_bytes, loading_bytes, model_bytes, parameter_shapes, repacking_bytes
from ernie_serve.model.recipes import Quantization
from ernie_serve.worker import memory

SMALL = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64, "threads": 1}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"COLUMNS": "160", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "ernie_serve", *arguments, "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=280)


def text_of(folder: Path, **settings: object) -> list[int]:
    """Greedy tokens after a prompt."""
    core, _ = build_engine(Settings(model=str(folder), **SMALL | settings), 600, lambda share, what: None)
    sampling = SamplingParams(max_tokens=12, seed=0, temperature=0.0)
    core.add(EngineRequest(request_id="r", prompt_token_ids=list(range(5, 40)), sampling=sampling))
    tokens: list[int] = []
    while core.has_work:
        tokens += [token for output in core.step() for token in output.token_ids]
    return tokens


@pytest.fixture(scope="module")
def folder(packable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verb") / "out"
    done = run("quantize", str(packable), str(out), "--quantization", "int8", "--report", "--report-tokens", "24")
    assert done.returncode == 0, done.stderr
    assert re.search(r"int8, \d+\.\d MB of weights\. Serve it with: ernie-serve serve", done.stderr)
    for word in ("attention", "dense", "experts", "head", "shared", "its own text", "random tokens"):
        assert word in done.stdout
    return out


@pytest.fixture(scope="module")
def packable(make_checkpoint) -> Path:
    return make_checkpoint("packable")


def test_a_quantized_folder_says_what_quantizing_while_loading_says(folder: Path, packable: Path) -> None:
    tokens = text_of(folder)
    assert len(tokens) == 12
    assert text_of(packable, quantization="int8") == tokens


def counting(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the last engine was planned with, filled when one is built."""
    counted: dict[str, int] = {}
    require, plan = memory.require_room, memory.plan_cache

    def require_room(weights: int, device: torch.device, passing: int, advice: str) -> None:
        counted.update(weights=weights, passing=passing)
        require(weights, device, passing, advice)

    def plan_cache(*args: Any, mapped_bytes: int = 0, **kwargs: Any) -> memory.CachePlan:
        counted["mapped"] = mapped_bytes
        return plan(*args, mapped_bytes=mapped_bytes, **kwargs)

    monkeypatch.setattr(memory, "require_room", require_room)
    monkeypatch.setattr(memory, "plan_cache", plan_cache)
    return counted


def test_with_a_compiler_the_engine_counts_a_folder_as_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused.operators() is None:
        pytest.skip("no C++ compiler")
    counted = counting(monkeypatch)
    assert len(text_of(folder)) == 12
    shapes = parameter_shapes(ModelConfig.from_folder(folder))
    size = model_bytes(shapes, Quantization.of("int8"), torch.float32)
    assert counted == {"weights": size, "passing": 0, "mapped": size}


@pytest.mark.skipif(not nibbles.available(), reason="this torch has no 4-bit product")
@pytest.mark.parametrize("recipe", ["int4", "int8", "mixed"])
def test_without_a_compiler_the_engine_serves_and_counts_what_it_copies(
    recipe: str,
    folder: Path,
    packable: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fused, "operators", lambda: None)
    counted = counting(monkeypatch)
    config = ModelConfig.from_folder(packable)
    shapes, quantization = parameter_shapes(config), Quantization.of(recipe)
    size = model_bytes(shapes, quantization, torch.float32) + repacking_bytes(shapes, quantization)
    passing = copying_bytes(shapes, quantization)
    assert len(text_of(packable, quantization=recipe)) == 12
    assert counted == {"weights": size, "passing": passing + loading_bytes(shapes, config, quantization), "mapped": 0}
    caplog.clear()
    assert len(text_of(folder)) == 12
    assert counted["passing"] == copying_bytes(shapes, Quantization.of("int8"))
    assert counted["mapped"] == 0
    assert re.search(r"copied for torch's own product: \d\.\d MiB, of this process alone, instead of", caplog.text)


@pytest.mark.skipif(not nibbles.available(), reason="this torch has no 4-bit product")
def test_where_a_compiler_would_make_weights_fit_it_is_named(packable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "operators", lambda: None)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 5 << 10)
    with pytest.raises(NotEnoughMemory, match=r"Install a C\+\+ compiler.* Then they need \d\.\d MiB"):
        build_engine(Settings(model=str(packable), quantization="int4"), 600, lambda share, what: None)


def test_an_8_bit_cache_serves(folder: Path) -> None:
    assert len(text_of(folder, kv_cache_dtype="int8")) == 12


def test_what_cannot_be_quantized_ends_in_one_line_and_leaves_nothing(tmp_path: Path, tiny_checkpoint: Path) -> None:
    done = run("quantize", str(tiny_checkpoint), str(tmp_path / "out"))
    assert done.returncode == 1
    assert "96 columns" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_quantization_that_is_none_is_told_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ernie-serve", "quantize", "a", "b", "--quantization", "int3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "it is int4, int8, mixed or fp8" in capsys.readouterr().err


@pytest.fixture(scope="module")
def half_precision(packable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint in float16."""
    folder = tmp_path_factory.mktemp("half") / "checkpoint"
    shutil.copytree(packable, folder)
    config = json.loads((folder / "config.json").read_text())
    config[next(name for name in ("dtype", "torch_dtype") if name in config)] = "float16"
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    halves = {name: tensor.half() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in tensors.items()}
    save_file(halves, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"kv_cache_dtype": "int8"}])
def test_a_checkpoint_in_float16_is_quantized_to_the_same_text(
    packable: Path, half_precision: Path, settings: dict[str, str]
) -> None:
    settings = {"quantization": "int8", **settings}
    assert text_of(half_precision, **settings) == text_of(packable, **settings)


def test_what_a_checkpoint_in_float16_says_by_itself_is_read_by_the_operators(half_precision: Path) -> None:
    assert len(text_of(half_precision, quantization="int4")) == 12


def test_arithmetic_in_float16_reads_a_cache_of_8_bits(half_precision: Path) -> None:
    assert text_of(half_precision, kv_cache_dtype="int8")[:4] == text_of(half_precision)[:4]


def test_weights_that_do_not_fit_are_told_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 5 << 20)
    with pytest.raises(
        NotEnoughMemory, match=r"weights need \d\.\d MiB.*With --quantization int4 they need \d\.\d MiB"
    ):
        build_engine(Settings(model=str(ERNIE_TINY), dtype="float32"), 100, lambda share, what: None)
    with pytest.raises(NotEnoughMemory, match=r"loading them \d+\.\d MiB more for a while"):
        build_engine(Settings(model=str(ERNIE_TINY), quantization="int4"), 100, lambda share, what: None)


def test_mapped_weights_count_as_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_folder(folder)
    weights = model_bytes(parameter_shapes(config), Quantization.of("int8"), torch.float32)
    sizes: dict[str, Any] = {"block_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 4, "max_model_len": 16}
    sizes["gpu_memory_utilization"] = 0.9
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "free_bytes", lambda device: weights + 10_000_000)
    plain = memory.plan_cache(config, torch.float32, cpu, **sizes)
    mapped = memory.plan_cache(config, torch.float32, cpu, mapped_bytes=weights, cache_dtype=torch.int8, **sizes)
    assert mapped.num_bytes < plain.num_bytes
    with pytest.raises(NotEnoughMemory):
        memory.plan_cache(config, torch.float32, cpu, mapped_bytes=weights + 10_000_000, **sizes)


def test_a_recipe_that_contradicts_the_folder_is_refused_before_the_weights_are_read(folder: Path) -> None:
    with pytest.raises(SettingsError, match="quantized already"):
        build_engine(Settings(model=str(folder), quantization="int4"), 600, lambda share, what: None)


def test_a_folder_for_a_gpu_is_written_without_one_and_refused_without_one(packable: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--quantization", "fp8", "--device", "cuda", "--report", "--report-tokens", "12")
    done = run("quantize", str(packable), str(out), *flags)
    assert done.returncode == 0, done.stderr
    assert f"ernie-serve serve {out} --device cuda" in done.stderr
    for word in ("experts", "shared", "attention", "dense", "fp8", "its own text"):
        assert word in done.stdout
    assert "head" not in done.stdout
    with pytest.raises(SettingsError, match="quantized for --device cuda, and the device is cpu"):
        build_engine(Settings(model=str(out), device="cpu", **SMALL), 600, lambda share, what: None)
