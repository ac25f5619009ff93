"""Tensors here are so small that a second thread only waits, longest where the machine is shared."""

import pytest
import torch

from ernie_serve.kernels import native as operators


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def native():
    """The operators as this processor serves them, compiled once for each state of the source."""
    ops = operators.operators()
    if ops is None:
        pytest.skip("no C++ compiler")
    return ops


@pytest.fixture(scope="session")
def portable(native):
    """The operators without what only some processors have."""
    return operators.load(portable=True, extra_flags=("-O1",))
