"""A start finds out whether the kernels of one row give what those of several give, and does without them if not."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ernie_serve.kernels.reference import Matrix, ReferenceKernels
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.weights import load_weights
from ernie_serve.worker.self_check import check_one_row


class Kernels(ReferenceKernels):
    """Those of the reference, but that one row, where they fuse, has a norm and product of another making."""

    def __init__(self, of_one_row: Callable[[Tensor], Tensor]) -> None:
        self.fuses = True
        self.times = 0
        self._of_one_row = of_one_row

    def norm_linear(
        self, stream: Tensor, pending: Tensor | None, norm: Tensor, eps: float, weight: Matrix
    ) -> tuple[Tensor, Tensor]:
        stream, made = super().norm_linear(stream, pending, norm, eps, weight)
        if self.fuses and len(stream) == 1:
            self.times += 1
            made = self._of_one_row(made)
        return stream, made


def checked(folder: Path, of_one_row: Callable[[Tensor], Tensor]) -> Kernels:
    kernels, config = Kernels(of_one_row), ModelConfig.from_folder(folder)
    with torch.device("meta"):
        model = Ernie(config, kernels, torch.float32)
    load_weights(model, folder)
    cache = [
        kernels.empty_cache(2, 2, config.num_key_value_heads, config.head_dim, torch.float32, torch.device("cpu"))
        for _ in model.layers
    ]
    check_one_row(model, kernels, cache, 2)
    assert kernels.times
    return kernels


def test_what_agrees_stays(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert checked(tiny_checkpoint, lambda made: made * 1.01).fuses
    assert not caplog.records


@pytest.mark.parametrize("wrong", [lambda x: -x, lambda x: x.roll(1, -1), lambda x: x * float("nan"), torch.zeros_like])
def test_what_is_off_is_left_out_with_a_warning(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture, wrong: Callable[[Tensor], Tensor]
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not checked(tiny_checkpoint, wrong).fuses
    assert "One stream does without kernels of its own, because theirs are off by" in caplog.text


def test_what_does_not_run_is_left_out_with_what_it_said(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(made: Tensor) -> Tensor:
        raise RuntimeError("out of resource: shared memory")

    with caplog.at_level(logging.WARNING):
        assert not checked(tiny_checkpoint, fails).fuses
    assert "RuntimeError: out of resource: shared memory" in caplog.text


def test_memory_that_runs_out_is_not_the_kernels_fault(tiny_checkpoint: Path) -> None:
    def fails(made: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        checked(tiny_checkpoint, fails)
