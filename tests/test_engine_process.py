"""What a start refuses, it refuses before the weights are read."""

import shutil
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie_serve.config import Settings
from ernie_serve.engine.core import EngineCore
from ernie_serve.engine_process import _warm_up, advice_for, build_engine
from ernie_serve.errors import NotEnoughMemory, SettingsError, StartupError
from ernie_serve.messages import EngineOutput, EngineRequest
from ernie_serve.model import hub
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.quantize import parameter_shapes
from ernie_serve.model.random_checkpoint import GEOMETRIES
from ernie_serve.model.recipes import Quantization
from ernie_serve.worker import cores, memory


def test_a_length_beyond_the_checkpoints_is_refused_before_the_weights_are_read(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "no-weights"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    heard: list[str] = []

    def report(share: float, what: str) -> None:
        heard.append(what)

    with pytest.raises(SettingsError, match="--max-model-len 999999: this checkpoint reads at most 131072 tokens"):
        build_engine(Settings(model=str(folder), max_model_len=999999), 100, report)
    assert not heard


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused_with_both_numbers(tiny_checkpoint: Path) -> None:
    with pytest.raises(StartupError, match=r"has 641 ids, the model only 640 .*Resize the model's embedding"):
        build_engine(Settings(model=str(tiny_checkpoint)), 641, lambda share, what: None)


def test_weights_that_have_no_room_are_not_downloaded(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def resolve(model: str, revision: str | None, what: str, report: object) -> Path:
        fetched.append(what)
        return tiny_checkpoint

    monkeypatch.setattr(hub, "resolve", resolve)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(NotEnoughMemory, match="The weights need"):
        build_engine(Settings(model="baidu/ERNIE"), 100, lambda share, what: None)
    assert fetched == ["text"]


def test_memory_that_runs_out_on_the_way_is_told_with_what_to_lower(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("ernie_serve.engine_process.load", load)
    with pytest.raises(
        NotEnoughMemory, match=r"Tried to allocate 2\.00 GiB\. Lower --gpu-memory-utilization \(it is 0\.92"
    ):
        build_engine(Settings(model=str(tiny_checkpoint)), 100, lambda share, what: None)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({}, "--gpu-memory-utilization"),
        ({"kv_cache_memory_bytes": 1 << 20}, r"--kv-cache-memory-bytes \(it is 1048576"),
    ],
)
def test_memory_that_runs_out_in_the_first_step_is_told_with_what_to_lower(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], flag: str
) -> None:
    def execute(*args: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("ernie_serve.worker.runner.Runner.execute", execute)
    with pytest.raises(NotEnoughMemory, match=rf"a step of 1 tokens found too little\. Lower {flag}"):
        build_engine(Settings(model=str(tiny_checkpoint), **settings), 100, lambda share, what: None)


class FakeCore:
    """Takes all that was added in one step, and makes a token for each."""

    def __init__(self) -> None:
        self.waiting: list[EngineRequest] = []
        self.steps: list[list[EngineRequest]] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting)

    def add(self, request: EngineRequest) -> None:
        assert request.request_id not in [each.request_id for each in self.waiting]
        self.waiting.append(request)

    def step(self) -> list[EngineOutput]:
        self.steps.append(self.waiting)
        self.waiting = []
        return [
            EngineOutput(request_id=each.request_id, token_ids=[5], finish_reason="length") for each in self.steps[-1]
        ]


def test_a_start_makes_steps_of_every_length_of_texts_that_are_allowed() -> None:
    core = FakeCore()
    _warm_up(cast("EngineCore", core), Path("checkpoint"), [1, 17, 100], longest=40)
    assert [sum(len(each.prompt_token_ids) for each in step) for step in core.steps] == [1, 17, 100, 1]
    assert max(len(each.prompt_token_ids) for step in core.steps for each in step) == 40
    assert core.steps[-1][0].sampling.logit_bias, "copied scores lie otherwise in memory"
    assert core.steps[-1][0].sampling.logprobs == 0, "they tell of weights that are no numbers"


@pytest.mark.parametrize(("bits", "only"), [(0x7FC0, ""), (0x7FC0, "norm.weight"), (0x7F80, "")], ids=str)
def test_weights_that_are_no_numbers_end_the_start_with_the_checkpoints_name(
    tiny_checkpoint: Path, tmp_path: Path, bits: int, only: str
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.bfloat16 and (not only or name == f"model.{only}"):
                tensor.view(torch.int16).fill_(bits)
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(StartupError, match=f"first token with the checkpoint in {folder}.* no numbers"):
        build_engine(Settings(model=str(folder), max_model_len=64), 100, lambda share, what: None)


@pytest.mark.parametrize(("bytes_for_one", "asked", "num_threads"), [(1 << 40, None, 1), (0, None, 3), (1 << 40, 2, 2)])
def test_a_small_model_runs_in_one_thread_unless_more_are_asked_for(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, bytes_for_one: int, asked: int | None, num_threads: int
) -> None:
    told: list[int] = []
    monkeypatch.setattr(cores, "FOR_ONE_THREAD", bytes_for_one)
    monkeypatch.setattr(cores, "usable_cores", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    build_engine(Settings(model=str(tiny_checkpoint), threads=asked, max_model_len=64), 100, lambda share, what: None)
    assert told == [num_threads]


def test_what_is_advised_on_a_gpu_is_what_the_checkpoint_can_have() -> None:
    gpu, dense = torch.device("cuda:0"), ModelConfig.from_dict(GEOMETRIES["0.3b"])
    shapes = parameter_shapes(dense)
    said = advice_for(dense, shapes, None, torch.bfloat16, gpu)
    assert said.startswith("With --quantization int8 they need 445.8 MiB; or use a GPU")
    assert "smaller checkpoint" in advice_for(dense, shapes, Quantization.of("int8", "cuda"), torch.bfloat16, gpu)
