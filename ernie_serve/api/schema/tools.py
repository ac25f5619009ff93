"""The functions that an answer may call, as clients send them, and which of them it must.

Knows OpenAI's tools and tool choices. Knows nothing of prompts or grammars.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ernie_serve.api.schema.validation import kind_of
from ernie_serve.errors import InvalidRequest

MAX_TOOLS = 128
MAX_DESCRIPTION = 16_384

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")

_FUNCTION_FIELDS = (
    ("description", str, "a string"),
    ("parameters", dict, "an object"),
    ("strict", bool, "true or false"),
)

TOOLS = {
    "type": "array",
    "maxItems": MAX_TOOLS,
    "items": {
        "type": "object",
        "properties": {
            "type": {"enum": ["function"]},
            "function": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "pattern": f"^{_NAME.pattern}$"},
                    "description": {"type": "string", "maxLength": MAX_DESCRIPTION},
                    "parameters": {"type": "object"},
                    "strict": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                },
                "required": ["name"],
            },
        },
        "required": ["type", "function"],
    },
}
"""Tools for the API's own description."""

TOOL_CHOICE = {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}
"""A tool choice for the API's own description."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What may be called, and whether it must be. `names` are those of `tools` that may; `named` the one that must."""

    tools: Sequence[dict[str, Any]] = ()
    mode: Literal["none", "auto", "required"] = "none"
    names: tuple[str, ...] = ()
    named: str | None = None
    parallel: bool = True

    @property
    def told(self) -> str:
        """The choice as a prompt tells it: a mode, or a name."""
        return self.named or self.mode


def read_tools(tools: Any) -> list[dict[str, Any]]:
    """`tools` in OpenAI's chat form, with nothing but what is known of it. Raises `InvalidRequest` with the place."""
    if tools is None:
        return []
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"`tools` must be a list of at most {MAX_TOOLS} tools.", param="tools")
    read = [_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in read]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest(f"`tools` has two functions named {twice!r}. Rename one of them.", param="tools")
    return read


def _read_tool(tool: Any, path: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise InvalidRequest(f"`{path}` must be an object, not {kind_of(tool)}.", param=path)
    if (kind := tool.get("type")) != "function":
        named = repr(kind[:40]) if isinstance(kind, str) else kind_of(kind)
        told = (
            f"`{path}.type` must be 'function', not {named}: this server runs no tools of its own. Leave that one out."
        )
        raise InvalidRequest(told, param=f"{path}.type")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest(f"`{path}.function` must be an object, not {kind_of(function)}.", param=f"{path}.function")
    return {"type": "function", "function": read_function(function, f"{path}.function")}


def read_function(function: dict[str, Any], path: str) -> dict[str, Any]:
    """A function's name, description, parameters and strictness; what is `null` is left out."""
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        told = f"`{path}.name` must be 1 to 64 letters, digits, underscores, dots or dashes."
        raise InvalidRequest(told, param=f"{path}.name")
    read: dict[str, Any] = {"name": name}
    for field, kind, named in _FUNCTION_FIELDS:
        if (value := function.get(field)) is None:
            continue
        if not isinstance(value, kind):
            told = f"`{path}.{field}` must be {named}, not {kind_of(value)}."
            raise InvalidRequest(told, param=f"{path}.{field}")
        read[field] = value
    if len(read.get("description", "")) > MAX_DESCRIPTION:
        told = f"`{path}.description` must have at most {MAX_DESCRIPTION} characters."
        raise InvalidRequest(told, param=f"{path}.description")
    return read


def read_tool_use(tools: Sequence[dict[str, Any]], choice: Any, parallel: bool | None) -> ToolUse:
    """What `tool_choice` makes of the tools: none, auto, required, a function by name, or the allowed ones.

    Chat's nested form and the flat form of Responses are both read. Raises `InvalidRequest`.
    """
    names = tuple(tool["function"]["name"] for tool in tools)
    if choice is None:
        choice = "auto" if tools else "none"
    if isinstance(choice, dict):
        match choice.get("type"):
            case "function":
                named = _name_in(choice, names)
                return ToolUse(tools, "required", (named,), named, parallel=False)
            case "allowed_tools":
                allowed = choice.get("allowed_tools", choice)
                if not isinstance(allowed, dict):
                    raise InvalidRequest("`tool_choice.allowed_tools` must be an object.", param="tool_choice")
                names, choice = _allowed(allowed, names), allowed.get("mode")
            case _:
                told = "`tool_choice.type` must be 'function' or 'allowed_tools'; no other tools are offered."
                raise InvalidRequest(told, param="tool_choice")
        if choice not in ("auto", "required"):
            raise InvalidRequest("`tool_choice.allowed_tools.mode` must be auto or required.", param="tool_choice")
    if choice not in ("none", "auto", "required"):
        told = "`tool_choice` must be none, auto, required, a function's name in an object, or allowed_tools."
        raise InvalidRequest(told, param="tool_choice")
    if choice == "required" and not names:
        told = "`tool_choice` is required, but there are no tools to choose from. Send `tools`."
        raise InvalidRequest(told, param="tool_choice")
    if choice == "none" or not names:
        return ToolUse(tools, "none")
    return ToolUse(tools, choice, names, parallel=parallel is not False)


def _allowed(allowed: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    tools = allowed.get("tools")
    if not isinstance(tools, list) or not 0 < len(tools) <= MAX_TOOLS:
        raise InvalidRequest("`tool_choice.allowed_tools.tools` must list at least one tool.", param="tool_choice")
    return tuple(dict.fromkeys(_name_in(tool, names) for tool in tools))


def _name_in(reference: Any, names: Sequence[str]) -> str:
    """The name in `{"type": "function", "function": {"name": …}}` or `{"type": "function", "name": …}`."""
    inner = reference.get("function", reference) if isinstance(reference, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or name not in names:
        told = f"`tool_choice` names the function {str(name)[:64]!r}, which is not one of `tools`."
        raise InvalidRequest(told, param="tool_choice")
    return name
