"""What is said of a command line that has words without a place."""

import os
import subprocess
import sys

import pytest
from command import Run

from ernie_serve.settings_command import read


class Flag:
    """As much of an option as tells how many words it takes."""

    def __init__(self, *, is_flag: bool = False, multiple: bool = False) -> None:
        self.is_flag = is_flag
        self.multiple = multiple


FLAGS = {
    "--port": Flag(),
    "--api-key": Flag(multiple=True),
    "--served-model-name": Flag(multiple=True),
    "--billing": Flag(is_flag=True),
}


@pytest.mark.parametrize(
    ("line", "unknown", "loose", "followed"),
    [
        ("m --port 5 --billing", "", "m", ""),
        ("--port -5 m --billing n", "", "m n", ""),
        ("--port=5 -- --x m", "", "--x m", ""),
        ("--served_model_name a b --port 5", "", "b", "--served-model-name"),
        ("--api-key k1 k2 k3 --served-model-name a b", "", "k2 k3 b", "--api-key --served-model-name"),
        ("--api-key=k1 m", "", "m", "--api-key"),
        ("m --api-key k1 --port 5", "", "m", ""),
        ("--api-key k1 --port 5 m", "", "m", ""),
        ("--api-key k1 --other m", "--other", "m", ""),
        ("-tp 2 --max_tokens=5 - m", "-tp --max-tokens", "2 - m", ""),
        ("m --port", "", "m", ""),
    ],
)
def test_words_are_sorted_by_what_takes_them(line: str, unknown: str, loose: str, followed: str) -> None:
    assert read(line.split(), FLAGS) == (unknown.split(), loose.split(), followed.split())


@pytest.fixture
def told(run_command: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command that fails; its exit code, the lines it tells, without their frame, and nothing."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

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


def test_a_list_in_several_words_is_told_to_be_one(told: Run) -> None:
    code, lines, _ = told("serve", "m", "--api-key", "secret-1", "secret-2")
    assert code == 2
    assert "There are 2 words without a flag, and a place for one. Several values of --api-key are one, with" in lines
    assert "secret" not in lines
    assert "unexpected extra argument(s) (n)" in told("serve", "m", "n", "--api-key", "secret-1")[1]


def test_a_model_that_is_not_there_may_have_been_meant_for_the_list_before_it(told: Run) -> None:
    meant = "Several values of --served-model-name are one, with commas and no spaces between."
    code, lines, _ = told("generate", "--prompt", "a", "--served-model-name", "a", "b")
    assert code == 1
    assert lines.startswith("ernie-serve: b is no local folder")
    assert lines.endswith(meant)
    for elsewhere in (
        ["b", "--served-model-name", "a"],
        ["--served-model-name", "a", "docs"],
        ["--served-model-name", "a", "org/b"],
    ):
        assert meant not in told("generate", "--prompt", "a", *elsewhere)[1]


def test_completion_goes_on_where_words_have_no_place() -> None:
    line = "ernie-serve serve --served-model-name a b c --max-model"
    asked = {"_ERNIE_SERVE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "6"}
    program = "import sys; sys.argv[0] = 'ernie-serve'; from ernie_serve.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | asked, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("--max-model-len", "")


def test_a_model_that_is_spelled_like_a_key_is_not_shown(told: Run) -> None:
    for verb in (["serve"], ["config", "show"]):
        code, lines, _ = told(*verb, "--api-key", "sk-1", "sk-secret")
        assert code == 1
        assert "model = … (from flag MODEL): it begins like a key" in lines
        assert "secret" not in lines
