"""What a start refuses, it refuses before the weights are read."""

import shutil
from pathlib import Path

import pytest

from ernie_serve.config import Settings
from ernie_serve.engine_process import build_engine
from ernie_serve.errors import SettingsError


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
