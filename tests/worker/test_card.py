"""The GPU that is meant is the one that is used, and one that is not there is told with the reason."""

import logging
from contextlib import nullcontext

import pytest
import torch

from ernie_serve.errors import DeviceLost, SettingsError, StartupError
from ernie_serve.worker.card import current, device_of, named, require_kernels, take


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    """A PyTorch with CUDA whose driver is too old."""

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update it.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.usefixtures("two_gpus")
def test_of_several_gpus_the_first_is_taken_or_the_one_that_is_named():
    assert device_of("auto") == device_of("cuda") == torch.device("cuda:0")
    assert device_of("cuda:1") == torch.device("cuda:1")
    assert device_of("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_beyond_the_last_is_refused_with_those_that_are_there():
    with pytest.raises(SettingsError, match=r"--device cuda:2: PyTorch sees 2 GPUs\. Use cuda:0 to cuda:1\."):
        device_of("cuda:2")


@pytest.mark.usefixtures("no_gpu")
def test_a_driver_that_is_too_old_is_told_as_torch_tells_it():
    with pytest.raises(
        SettingsError, match=r"is too old \(found version 12020\)\. Please update it\. .* for CUDA 13\.0"
    ):
        device_of("cuda")


def test_a_torch_without_cuda_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(SettingsError, match=r"--device cuda:1: .* built without CUDA: install a CUDA build"):
        device_of("cuda:1")


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_nobody_sees_is_not_passed_over_in_silence(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    assert device_of("auto", tmp_path) == torch.device("cpu")
    assert not caplog.text, "this machine has none"
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    assert device_of("auto", tmp_path) == torch.device("cpu")
    assert "so the CPU serves. It says: The NVIDIA driver on your system is too old" in caplog.text
    assert device_of("cpu", tmp_path) == torch.device("cpu")


@pytest.fixture
def entered(monkeypatch):
    """GPUs that were made current."""
    found = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: found.append(device) or nullcontext())
    return found


def test_steps_run_with_their_own_gpu_as_the_current_one(entered):
    with current(torch.device("cuda:1")), current(torch.device("cpu")):
        assert entered == [torch.device("cuda:1")]


class Lost:
    """The context of a GPU that answers nothing: whoever leaves it gets an error of its own."""

    def __init__(self, device):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *error):
        raise torch.AcceleratorError("nobody may leave")


@pytest.mark.usefixtures("entered")
def test_what_fails_is_raised_as_it_is_unless_the_gpu_is_lost(monkeypatch):
    """After an illegal access every call fails; after any other error a GPU goes on."""

    def synchronize(device):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with pytest.raises(torch.OutOfMemoryError), current(torch.device("cuda:1")):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with (
        pytest.raises(DeviceLost, match=r"cuda:1 is lost: an illegal access\. Only a new"),
        current(torch.device("cuda:1")),
    ):
        raise RuntimeError("an illegal access.\nCUDA kernel errors might be reported elsewhere.")
    monkeypatch.setattr(torch.cuda, "device", Lost)
    with pytest.raises(DeviceLost, match="nobody may leave"), current(torch.device("cuda:1")):
        raise RuntimeError("an illegal access.")
    with pytest.raises(RuntimeError, match="of a CPU"), current(torch.device("cpu")):
        raise RuntimeError("of a CPU")


def test_a_gpu_without_bfloat16_is_refused_with_both_capabilities():
    require_kernels("NVIDIA A100-SXM4-40GB", (8, 0))
    with pytest.raises(
        SettingsError, match=r"Tesla T4 has compute capability 7\.5; the kernels need 8\.0 .*--device cpu"
    ):
        require_kernels("Tesla T4", (7, 5))


def test_a_gpu_that_is_full_or_anothers_is_told_in_a_line(monkeypatch):
    def set_device(device):
        raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere.")

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(StartupError, match=r"cuda:1 cannot be used: CUDA error: out of memory\. `nvidia-smi` shows"):
        take(torch.device("cuda:1"))
    take(torch.device("cpu"))


def test_a_gpu_is_shown_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert named(torch.device("cuda:0")) == "NVIDIA H200 (cuda:0)"
    assert named(torch.device("cpu")) == "cpu"
