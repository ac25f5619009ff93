"""Triton's interpreter runs these kernels on CPU tensors; it has to be asked for before a kernel is defined.

They are a job of their own, `-m triton`; any other run neither imports Triton nor learns of the interpreter.
"""

import os
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.option.markexpr == "not triton" and _HERE in collection_path.parents:
        return True
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns of the next version's default otherwise
    return None


def pytest_itemcollected(item: pytest.Item) -> None:
    if _HERE in item.path.parents:
        item.add_marker("triton")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch):
    """Memory that is to be written is full of what nobody would write, so that a gap in the output shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        return tensor.fill_(-99) if tensor.dtype.is_signed else tensor.fill_(199)

    monkeypatch.setattr(torch, "empty", lambda *args, **options: poisoned(empty(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poisoned(empty_like(*args, **options)))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.fixture(autouse=True)
def _sanitized():
    """Every launch is checked for what a card would not forgive."""
    from kernels.triton.interpreting import without_idle_work  # imports Triton, which other jobs must not
    from kernels.triton.sanitizer import watched

    with without_idle_work(), watched():
        yield
