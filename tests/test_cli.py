"""The command line: help, suggestions, exit codes."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_serve import config
from ernie_serve.config import Settings

ROOT = Path(__file__).parent.parent


def _run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ERNIE_SERVE_")}
    environ = clean | {"COLUMNS": "200", "NO_COLOR": "1"} | environ
    command = [sys.executable, "-m", "ernie_serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, cwd=ROOT)


def test_the_version_is_shown() -> None:
    assert _run("--version").stdout.strip() == importlib.metadata.version("ernie-serve")
    assert _run("keys", "--help").returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_could_not_be_written_is_told_and_no_success(unbuffered: str) -> None:
    environ = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "ernie_serve", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environ, timeout=60, cwd=ROOT
        )
    assert (done.returncode, done.stderr) == (1, "ernie-serve: Nothing more can be written: No space left on device.\n")


def test_help_lists_what_serves_first_and_what_bills_later() -> None:
    verbs = re.findall(r"^\W ([a-z]+)  ", _run("--help").stdout, re.MULTILINE)
    assert verbs[:6] == ["serve", "generate", "bench", "doctor", "quantize", "usage"]


def test_help_names_every_setting() -> None:
    shown = _run("serve", "--help").stdout
    for name in Settings.model_fields:
        assert config.flag_name(name) in shown or name == "model"


def test_help_names_every_setting_in_a_narrow_terminal_too() -> None:
    for verb in (["serve"], ["config", "show"]):
        shown = _run(*verb, "--help", COLUMNS="80").stdout
        assert max(map(len, shown.splitlines())) <= 80
        for name, field in Settings.model_fields.items():
            flag = config.flag_name(name)
            assert f"{flag} " in shown or name == "model"
            assert field.annotation is not bool or f"--no-{flag[2:]} " in shown.replace("\n", " ")


def test_help_names_the_words_of_a_setting_that_has_some() -> None:
    shown = _run("serve", "--help", COLUMNS="400").stdout
    for told in (
        "[one of auto, bfloat16, float16, float32; default: auto]",
        "[one of int4, int8, mixed, fp8]",
        "[one of debug, info, warning, error; default: info]",
    ):
        assert told in shown


def test_an_unknown_flag_suggests_the_nearest() -> None:
    done = _run("serve", "--max-model-length", "5")
    assert done.returncode == 2
    assert "--max-model-len" in done.stderr.replace("--max-model-length", "")


def test_flags_may_be_spelled_with_underscores() -> None:
    shown = _run(
        "config", "show", "--max_model_len", "77", "--no-enable_prefix_caching", "--served-model_name=a_b"
    ).stdout
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines()}
    assert lines["max-model-len"] == ["77", "flag", "--max-model-len"]
    assert lines["enable-prefix-caching"][0] == "False"
    assert lines["served-model-name"][0] == "('a_b',)"
    assert "--max-concurrent is `x`" in _run("keys", "create", "laptop", "--max_concurrent", "x").stderr
    assert "--max-concurrency counts like" in _run("bench", "--max_concurrency", "x").stderr
    assert "`x` is no database URL" in _run("topup", "a", "-5", "--database_url", "x").stderr


def test_a_wrong_value_ends_in_one_line_and_exit_code_1() -> None:
    done = _run("serve", "--port", "99999")
    assert done.returncode == 1
    assert "flag --port" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_prompt_is_told_instead_of_continued() -> None:
    done = _run("generate", "--prompt", "")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--prompt is empty" in done.stderr


def test_counts_that_no_message_holds_are_refused_with_the_limit() -> None:
    for flags in (("generate", "--prompt", "a", "--max-tokens"), ("bench", "--output-len")):
        done = _run(*flags, "9223372036854775808")
        assert done.returncode == 2
        assert "9223372036854775807" in done.stderr


def test_config_show_prints_values_and_origins_but_no_key() -> None:
    done = _run("config", "show", "--no-enable-prefix-caching", "--api-key", "sk-secret", ERNIE_SERVE_PORT="9")
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()}
    assert "ernie-tiny (bundled)" in lines["model"]
    assert "environment ERNIE_SERVE_PORT" in lines["port"]
    assert "False" in lines["enable-prefix-caching"]
    assert "sk-secret" not in done.stdout


def test_config_show_cuts_nothing_off_however_narrow_it_is() -> None:
    long = "https://" + "a" * 150 + ".com"
    environ = {"ERNIE_SERVE_ALLOWED_ORIGINS": long, "ERNIE_SERVE_MODEL": "[a]/b", "COLUMNS": "40"}
    lines = _run("config", "show", **environ).stdout.splitlines()
    assert len(lines) == len(Settings.model_fields) + 1
    (line,) = [line for line in lines if line.startswith("allowed-origins ")]
    assert line.split() == ["allowed-origins", f"('{long}',)", "environment", "ERNIE_SERVE_ALLOWED_ORIGINS"]
    assert lines[1].split()[1] == "[a]/b"
    folded = _run("config", "show", **environ, FORCE_COLOR="1").stdout
    assert "…" not in folded
    assert folded.count("a") > 150


def _leave(program: str) -> subprocess.CompletedProcess[str]:
    code = f"from ernie_serve.leaving import leave_after\n{program}"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=buffered)


def test_a_process_ends_with_its_code_all_it_said_and_nothing_taken_down() -> None:
    left = "import atexit, sys\natexit.register(print, 'taken down')\ndef main():\n    print('out', end='')\n    "
    for end, code in (("return 3", 3), ("return None", 0), ("sys.exit(4)", 4), ("sys.exit()", 0)):
        done = _leave(f"{left}{end}\nleave_after(main)")
        assert (done.returncode, done.stdout, done.stderr) == (code, "out", "")


def test_a_process_whose_reader_has_gone_ends_quietly() -> None:
    gone = "import os\nreader, writer = os.pipe()\nos.close(reader)\nos.dup2(writer, 1)\n"
    done = _leave(f"{gone}leave_after(lambda: print('to nobody'))")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_nobody_expects_still_shows_where_it_was() -> None:
    done = _leave("def main():\n    raise ValueError('odd')\nleave_after(main)")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.rstrip().endswith("ValueError: odd")
    assert _leave("import sys\nleave_after(lambda: sys.exit('told'))").stderr == "told\n"


def test_a_name_that_is_nearly_one_of_ours_makes_no_store_and_hides_no_help(tmp_path: Path) -> None:
    wrong = {"ERNIE_SERVE_DATABASE_URI": f"sqlite:///{tmp_path}/mine.db", "XDG_DATA_HOME": str(tmp_path)}
    done = _run("keys", "create", "me", **wrong)
    assert done.returncode == 1
    assert "did you mean 'ERNIE_SERVE_DATABASE_URL'?" in done.stderr
    assert not list(tmp_path.iterdir())
    assert "--database-url" in _run("serve", "--help", COLUMNS="200", **wrong).stdout
