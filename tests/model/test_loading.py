"""Which form weights get is decided by the settings and the checkpoint together, before anything is read."""

from dataclasses import replace

import pytest
import torch

from ernie_serve.errors import SettingsError
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.loading import dtypes_of, quantization_of
from ernie_serve.model.random_checkpoint import GEOMETRIES
from ernie_serve.model.recipes import Quantization

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
PLAIN = ModelConfig.from_dict(GEOMETRIES["21b"])
INT4 = Quantization.of("int4")
STORED = replace(PLAIN, quantization=INT4)


def test_a_plain_checkpoint_is_quantized_where_that_is_asked_for() -> None:
    assert quantization_of(PLAIN, None, CPU) is None
    assert quantization_of(PLAIN, "int4", CPU) == INT4


def test_a_quantized_checkpoint_needs_no_flag_and_takes_no_other() -> None:
    assert quantization_of(STORED, None, CPU) == INT4
    assert quantization_of(STORED, "int4", CPU) == INT4
    with pytest.raises(SettingsError, match=r"--quantization int8: this checkpoint is quantized already \(int4\)"):
        quantization_of(STORED, "int8", CPU)


@pytest.mark.parametrize(("config", "wanted"), [(PLAIN, "int4"), (STORED, None)])
def test_the_formats_of_a_cpu_are_refused_on_a_gpu(config: ModelConfig, wanted: str | None) -> None:
    with pytest.raises(SettingsError, match=r"int4 weights are served on a CPU only.*cuda:0.*--device cpu"):
        quantization_of(config, wanted, GPU)
    assert quantization_of(PLAIN, None, GPU) is None


def test_between_quantized_matrices_numbers_are_float32_and_the_cache_keeps_the_checkpoints_dtype() -> None:
    assert dtypes_of(PLAIN, None, "auto", "auto") == (torch.bfloat16, torch.bfloat16)
    assert dtypes_of(PLAIN, INT4, "auto", "auto") == (torch.float32, torch.bfloat16)
    assert dtypes_of(PLAIN, INT4, "float32", "auto") == (torch.float32, torch.float32)
    assert dtypes_of(PLAIN, INT4, "bfloat16", "int8") == (torch.bfloat16, torch.int8)
    assert dtypes_of(PLAIN, None, "float32", "int8") == (torch.float32, torch.int8)
    with pytest.raises(SettingsError, match="--dtype float16"):
        dtypes_of(PLAIN, INT4, "float16", "auto")
