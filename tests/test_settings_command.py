"""What is said of a command line that has flags which are none."""

import pytest
from command import Run


@pytest.fixture
def told(run_command: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command that fails; its exit code, the lines it tells, without their frame, and nothing."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str) -> tuple[int, str, str]:
        code, out, err = run_command(*arguments)
        assert out == ""
        return code, "\n".join(line.strip("│ ") for line in err.splitlines()), ""

    return run


def test_all_unknown_flags_are_told_at_once_each_with_what_there_is_instead(told: Run) -> None:
    code, lines, _ = told(
        "serve", "m", "--tokenizer", "t", "--ssl-keyfile=f", "-tp", "2", "--max_model_length", "5", "--xyz", "--xyz"
    )
    assert code == 2
    assert lines[lines.index("No such options:") :].splitlines()[1:6] == [
        "--tokenizer: the checkpoint's own is taken, from its folder",
        "--ssl-keyfile: a proxy's job: docs/deploy.md",
        "-tp: one GPU only: a model is not split",
        "--max-model-length: did you mean --max-model-len?",
        "--xyz: --help lists those that there are",
    ]
    assert lines.count("--xyz") == 1


def test_one_unknown_flag_is_told_alike(told: Run) -> None:
    for verb in (["serve"], ["config", "show"], ["bench"], ["generate"]):
        code, lines, _ = told(*verb, "--seed", "1")
        assert code == 2
        assert "No such option:\n--seed: requests say seed" in lines
