"""The command line in this process, for tests that ask what a user is told.

Knows how a command is run and ends. Knows nothing of what it does.
"""

import sys
from collections.abc import Callable

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `ernie-serve` with these arguments; the exit code, and what went to both outputs."""
    from ernie_serve import cli

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ernie-serve", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code or 0
        assert isinstance(code, int)
        return code, *capfd.readouterr()

    return run
