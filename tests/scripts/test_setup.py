"""`scripts/setup` with an interpreter that only notes what it is asked to do."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PYTHON = """#!/bin/sh
echo "$@" >> "$NOTES"
case "$*" in
  --version) echo Python 3.12.0 ;;
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && [ -e pip ] && touch .venv/pip ;;
  "-m pip --version") [ -e .venv/pip ] ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def noted(project: Path, *words: str, rc: int = 0, **environ: str) -> list[str]:
    """What the interpreter was asked to make and to install."""
    notes = project / "notes"
    notes.write_text("")
    environ = {"PATH": os.environ["PATH"], "NOTES": str(notes), "PYTHON": str(project / "python")} | environ
    done = subprocess.run(["bash", project / "scripts/setup", *words], env=environ, capture_output=True, timeout=60)
    assert done.returncode == rc, done.stderr
    asked = [line for line in notes.read_text().splitlines() if "venv" in line or "pip install" in line]
    return [line.replace("--quiet --disable-pip-version-check --constraint constraints.txt ", "") for line in asked]


def test_an_environment_that_failed_half_made_is_made_anew(project: Path) -> None:
    assert noted(project, rc=1) == ["-m venv --clear .venv"]
    assert (project / ".venv/bin/python").exists()
    (project / "pip").touch()
    assert noted(project) == ["-m venv --clear .venv", "-m pip install --editable ."]


def test_nothing_is_done_where_nothing_changed(project: Path) -> None:
    (project / "pip").touch()
    assert noted(project) == ["-m venv --clear .venv", "-m pip install --editable ."]
    assert noted(project) == []
    assert noted(project, "test") == ["-m pip install --editable .[test]"]
    assert noted(project, "test") == noted(project) == noted(project, "postgres") == []  # which it includes


def test_torch_comes_first_from_an_index_of_its_own(project: Path) -> None:
    (project / "pip").touch()
    index = "https://download.pytorch.org/whl/cpu"
    installed = noted(project, TORCH_INDEX=index)[1:]
    assert installed == [f"-m pip install --index-url {index} torch", "-m pip install --editable ."]
