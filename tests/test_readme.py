"""The README's commands, run as they stand but for the port."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECONDS = 240


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def _answer(command: str, url: str) -> Any:
    done = subprocess.run(
        ["bash", "-c", command.replace("http://127.0.0.1:8000/v1", url)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The server that the README's first command starts, on a free port."""
    command = _blocks("bash")[0].splitlines()[0].split("#")[0].split()
    assert command == ["scripts/serve"]
    process = subprocess.Popen([*command, "--port", "0", "--threads", "1"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"URL\s+(http://\S+)", line):
                yield found[1]
                break
        else:
            pytest.fail("".join(said))
    finally:
        process.terminate()
        process.stderr.read()
        process.stderr.close()
        assert process.wait(SECONDS) == 0


def test_both_set_up_commands_are_there_and_can_be_run() -> None:
    for line in _blocks("bash")[0].splitlines():
        path = ROOT / line.split()[0]
        assert path.stat().st_mode & 0o100


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_curl_command_gets_an_answer(url: str) -> None:
    command = next(block for block in _blocks("bash") if block.startswith("curl"))
    assert "http://127.0.0.1:8000/v1" in command
    assert _answer(command, url)["choices"][0]["text"]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_function_that_is_said_to_be_called_is(url: str) -> None:
    command = next(block for block in _blocks("bash") if '"tools"' in block)
    (call,) = _answer(command, url)["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert 'call of `get_weather` whose `arguments` are `{"city": "Paris"}`' in README


def test_the_sdk_example_prints_an_answer(url: str) -> None:
    (code,) = _blocks("python")
    assert len(code.splitlines()) <= 12
    assert "http://127.0.0.1:8000/v1" in code
    command = [sys.executable, "-c", code.replace("http://127.0.0.1:8000/v1", url)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    assert done.stdout.strip()


def test_every_option_that_is_shown_exists() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "ernie_serve", "serve", "--help"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    ).stdout
    for block in _blocks("bash"):
        for line in block.splitlines():
            if line.startswith("scripts/serve"):
                assert set(re.findall(r"(--[a-z-]+)", line)) <= set(re.findall(r"(--[a-z-]+)", shown))


def test_every_file_of_the_tree_exists() -> None:
    tree = README[README.index("```\nernie_serve/") :].split("```")[1]
    for line in tree.splitlines():
        if found := re.match(r"( *)([a-z_./]+)(?:  |$)", line):
            indent, name = found.groups()
            assert (ROOT / ("ernie_serve" if indent else "") / name).exists(), name


def test_every_link_leads_somewhere() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
