"""The operators of `cpu.cpp`, compiled once."""

import pytest

from ernie_serve.kernels import native as operators


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
