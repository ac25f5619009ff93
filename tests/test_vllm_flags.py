"""vLLM's flags that are not here: what is told of them, and that the documentation tells the same."""

import re
from pathlib import Path

import pytest

from ernie_serve import config
from ernie_serve.config import Settings
from ernie_serve.vllm_flags import ELSEWHERE, elsewhere

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_documentation_has_the_same_table() -> None:
    section = PAGE[PAGE.index("\n## Coming from vLLM") :].split("\n## ")[1]
    rows = [line.replace("`", "").strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert [(flags.replace(", ", " "), told) for flags, told in rows] == list(ELSEWHERE)


@pytest.mark.parametrize(("flags", "told"), ELSEWHERE)
def test_each_flag_is_told_of_in_one_row(flags: str, told: str) -> None:
    for flag in flags.split():
        assert elsewhere(flag.replace("*", "x")) == told


def test_no_flag_of_ours_is_told_to_be_elsewhere() -> None:
    for name in (*Settings.model_fields, "config", "help"):
        flag = config.flag_name(name)
        assert not elsewhere(flag)
        assert not elsewhere(flag.replace("--", "--no-"))


def test_what_a_phrase_sends_to_is_there() -> None:
    for _, told in ELSEWHERE:
        for flag in re.findall(r"--[a-z-]+", told):
            assert flag[2:].replace("-", "_") in Settings.model_fields


def test_a_flag_is_known_by_its_opposite_and_by_what_is_set_inside_it() -> None:
    assert elsewhere("--no-enable-chunked-prefill") == elsewhere("--enable-chunked-prefill") != ""
    assert elsewhere("--compilation-config.level") == elsewhere("--compilation-config") != ""
    assert elsewhere("--invented") == ""
