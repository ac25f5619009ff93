from typing import Any

import pytest

from ernie_serve.api.schema.tools import ToolUse, read_tool_use, read_tools
from ernie_serve.errors import InvalidRequest


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


A, B = tool("a"), tool("b")


def test_tools_keep_what_is_known_of_them() -> None:
    full = tool("f", description="d", parameters={"type": "object"}, strict=True)
    assert read_tools([{**full, "other": 1}, tool("g", description=None, strict=None)]) == [full, tool("g")]
    assert read_tools(None) == read_tools([]) == []


@pytest.mark.parametrize(("kind", "named"), [("web_search", "'web_search'"), (None, "null"), (7, "an integer")])
def test_a_tool_that_is_no_function_is_named(kind: Any, named: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'function', not {named}") as raised:
        read_tools([tool("a"), {"type": kind}])
    assert raised.value.param == "tools[1].type"


def test_tools_have_limits() -> None:
    assert len(read_tools([tool(f"f{number}") for number in range(128)])) == 128
    for wrong in ([tool(f"f{number}") for number in range(129)], [A, A], [tool("n" * 65)], [tool("f", description=1)]):
        with pytest.raises(InvalidRequest, match="tools"):
            read_tools(wrong)


CHOICES: list[tuple[Any, ToolUse]] = [
    (None, ToolUse([A, B], "auto", ("a", "b"))),
    ("auto", ToolUse([A, B], "auto", ("a", "b"))),
    ("none", ToolUse([A, B], "none")),
    ("required", ToolUse([A, B], "required", ("a", "b"))),
    (tool("b"), ToolUse([A, B], "required", ("b",), "b", parallel=False)),
    ({"type": "function", "name": "b"}, ToolUse([A, B], "required", ("b",), "b", parallel=False)),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [B]}}, ToolUse([A, B], "auto", ("b",))),
    ({"type": "allowed_tools", "mode": "required", "tools": [B, B]}, ToolUse([A, B], "required", ("b",))),
]


@pytest.mark.parametrize(("choice", "use"), CHOICES)
def test_choice_says_what_may_be_called(choice: Any, use: ToolUse) -> None:
    assert read_tool_use([A, B], choice, None) == use
    assert read_tool_use([A, B], choice, False).parallel is (use.mode == "none")


def test_without_tools_there_is_nothing_to_choose() -> None:
    assert read_tool_use([], None, None) == read_tool_use([], "auto", True) == ToolUse([], "none")
    with pytest.raises(InvalidRequest, match="there are no tools"):
        read_tool_use([], "required", None)


@pytest.mark.parametrize(
    "choice",
    [
        1,
        "a",
        {},
        tool("c"),
        {"type": "function"},
        {"type": "custom", "custom": {"name": "a"}},
        {"type": "allowed_tools", "allowed_tools": []},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("c")]}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": [A]}},
    ],
)
def test_wrong_choice_is_named(choice: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read_tool_use([A, B], choice, None)
    assert raised.value.param == "tool_choice"


def test_prompt_is_told_the_choice() -> None:
    assert read_tool_use([A, B], tool("b"), None).told == "b"
    assert read_tool_use([A, B], "required", None).told == "required"
