"""Which form weights get is decided by the settings and the checkpoint together, before anything is read."""

from dataclasses import replace

import pytest
import torch

from ernie_serve.errors import SettingsError
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.loading import dtypes_of, quantization_of, require_fp8
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


def test_each_kind_of_device_has_its_own_layout_of_the_same_word() -> None:
    assert quantization_of(PLAIN, None, GPU) is None
    found = quantization_of(PLAIN, "int4", GPU)
    assert found == Quantization.of("int4", "cuda")
    assert found != INT4
    assert quantization_of(replace(PLAIN, quantization=found), None, GPU) == found


def test_a_folder_for_another_device_is_refused_with_both_names() -> None:
    with pytest.raises(SettingsError, match=r"quantized for --device cpu, and the device is cuda:0.*--device cuda"):
        quantization_of(STORED, None, GPU)
    for_gpu = replace(PLAIN, quantization=Quantization.of("fp8", "cuda"))
    with pytest.raises(SettingsError, match=r"quantized for --device cuda, and the device is cpu.*--device cpu`"):
        quantization_of(for_gpu, None, CPU)


def test_a_word_that_a_device_does_not_read_is_refused_with_those_it_does() -> None:
    with pytest.raises(SettingsError, match=r"--quantization fp8: on a CPU it is int4, int8, mixed\. .*--device cuda"):
        quantization_of(PLAIN, "fp8", CPU)
    dense = ModelConfig.from_dict(GEOMETRIES["0.3b"])
    with pytest.raises(SettingsError, match=r"4 bits are for experts, and this checkpoint has none\. Set int8 or fp8"):
        quantization_of(dense, "int4", GPU)
    assert quantization_of(dense, "fp8", GPU) == Quantization.of("fp8", "cuda")


def test_on_a_gpu_arithmetic_keeps_the_checkpoints_dtype_and_the_cache_may_be_fp8() -> None:
    int4 = Quantization.of("int4", "cuda")
    assert dtypes_of(PLAIN, int4, "auto", "auto", GPU) == (torch.bfloat16, torch.bfloat16)
    assert dtypes_of(PLAIN, int4, "auto", "fp8", GPU) == (torch.bfloat16, torch.float8_e4m3fn)
    assert dtypes_of(PLAIN, None, "auto", "int8", GPU) == (torch.bfloat16, torch.int8)
    with pytest.raises(SettingsError, match=r"--kv-cache-dtype fp8: only a GPU.*--kv-cache-dtype int8"):
        dtypes_of(PLAIN, None, "auto", "fp8", CPU)
    with pytest.raises(SettingsError, match=r"--dtype auto.*Set --dtype bfloat16"):
        dtypes_of(replace(PLAIN, dtype="float16"), int4, "auto", "auto", GPU)


def test_an_older_gpu_is_told_that_it_has_no_fp8() -> None:
    fp8, int4 = Quantization.of("fp8", "cuda"), Quantization.of("int4", "cuda")
    with pytest.raises(SettingsError, match=r"--quantization fp8: .*this one has 8\.6.*--quantization int8"):
        require_fp8(fp8, torch.bfloat16, (8, 6))
    with pytest.raises(SettingsError, match=r"--kv-cache-dtype fp8: .*--kv-cache-dtype int8"):
        require_fp8(int4, torch.float8_e4m3fn, (8, 6))
    require_fp8(int4, torch.int8, (8, 6))
    require_fp8(fp8, torch.float8_e4m3fn, (8, 9))
    require_fp8(fp8, torch.float8_e4m3fn, (9, 0))


def test_between_quantized_matrices_numbers_are_float32_and_the_cache_keeps_the_checkpoints_dtype() -> None:
    assert dtypes_of(PLAIN, None, "auto", "auto") == (torch.bfloat16, torch.bfloat16)
    assert dtypes_of(PLAIN, INT4, "auto", "auto") == (torch.float32, torch.bfloat16)
    assert dtypes_of(PLAIN, INT4, "float32", "auto") == (torch.float32, torch.float32)
    assert dtypes_of(PLAIN, INT4, "bfloat16", "int8") == (torch.bfloat16, torch.int8)
    assert dtypes_of(PLAIN, None, "float32", "int8") == (torch.float32, torch.int8)
    with pytest.raises(SettingsError, match="--dtype float16"):
        dtypes_of(PLAIN, INT4, "float16", "auto")
