"""Lets the tests of this room write `from engine_fakes import …`; those of other rooms ask for the fixture."""

import importlib.util
import sys
from pathlib import Path

import pytest

if "engine_fakes" not in sys.modules:
    spec = importlib.util.spec_from_file_location("engine_fakes", Path(__file__).with_name("fakes.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["engine_fakes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["engine_fakes"])


@pytest.fixture
def make_engine():
    return sys.modules["engine_fakes"].make_core
