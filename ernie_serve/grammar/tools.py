"""From a list of tools and how calls are framed to the grammar that permits nothing but calls of them.

Knows OpenAI's tools as JSON and the shape of a call, `{"name": …, "arguments": {…}}`. Knows no tokenizer but the ids
it is told, and nothing of prompts.
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar import limits
from ernie_serve.messages import Grammar

ToolMode = Literal["required", "auto"]


class Framing(Struct, frozen=True, kw_only=True):
    r"""What stands around a call, or around words: `before begin after_begin {…} before_end end after`.

    The first thing in an answer may have up to three line breaks before it instead of `before`.

    `begin` and `end` are control tokens where they have ids, plain text otherwise. The defaults are the family's,
    `\n<tool_call>\n{…}\n</tool_call>\n`, in plain text. Of the control tokens, who reads the answer sees
    only `seen_ids`.
    """

    begin: str = "<tool_call>"
    end: str = "</tool_call>"
    begin_id: int | None = None
    end_id: int | None = None
    seen_ids: tuple[int, ...] = ()
    before: str = "\n"
    after_begin: str = "\n"
    before_end: str = "\n"
    after: str = "\n"


class CallableTool(Struct, frozen=True):
    """A tool's name and the schema of its arguments, which are always an object."""

    name: str
    arguments: dict[str, Any]


class ToolGrammar(Struct, frozen=True, kw_only=True):
    """What a grammar of the kind "tools" holds. `free_text` lets text stand around calls, and have none.

    With `otherwise` the answer is calls, or a text of that form and no call; `words` then stands around that text.
    """

    tools: list[CallableTool]
    framing: Framing
    free_text: bool
    parallel: bool
    otherwise: Grammar | None = None
    words: Framing | None = None


def tool_grammar(
    tools: Sequence[dict[str, Any]],
    framing: Framing,
    *,
    mode: ToolMode = "required",
    names: Collection[str] | None = None,
    parallel: bool = True,
    otherwise: Grammar | None = None,
    words: Framing | None = None,
) -> Grammar:
    """The grammar of an answer that calls some of these tools, which are OpenAI's `{"type": "function", …}`.

    With mode "required" the answer is one call, or several if `parallel`, and nothing else. With "auto" it is any text
    and any number of calls, but after a call's beginning a call must follow; where `otherwise` is given it is calls, or
    a text of that form, and nothing else. Where the model frames its words, `words` must say how: it could not begin
    them otherwise, and would call a tool instead. `names` are the tools that may be called (a named tool, or
    `allowed_tools`); all by default. Arguments satisfy their tool's `parameters`; with "auto" only for tools that are
    `strict`, and for others they are any object.

    Raises `InvalidRequest`, which names the tool, for what cannot be promised.
    """
    functions = [tool["function"] for tool in tools]
    if unknown := set(names or ()) - {function["name"] for function in functions}:
        raise InvalidRequest(f"`{min(unknown)[:64]}` is not the name of a tool in `tools`.", param="tool_choice")
    chosen = [function for function in functions if names is None or function["name"] in names]
    if not chosen:
        raise InvalidRequest("There is no tool that could be called. Give at least one.", param="tools")
    spec = ToolGrammar(
        tools=[CallableTool(each["name"], _arguments(each, exact=_is_exact(each, mode))) for each in chosen],
        framing=framing,
        free_text=mode == "auto" and otherwise is None,
        parallel=parallel,
        otherwise=otherwise,
        words=words,
    )
    return Grammar("tools", msgspec.json.encode(spec).decode())


def read(text: str) -> ToolGrammar:
    """What `tool_grammar` wrote, held to the limits once more. Raises `InvalidRequest`."""
    try:
        spec = msgspec.json.decode(text, type=ToolGrammar)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(f"The tool grammar cannot be read: {error}.") from None
    for tool in spec.tools:
        limits.check_schema(tool.arguments)
    return spec


def _is_exact(function: dict[str, Any], mode: ToolMode) -> bool:
    return mode == "required" or bool(function.get("strict"))


def _arguments(function: dict[str, Any], *, exact: bool) -> dict[str, Any]:
    """The schema of a tool's arguments: an object, whatever else is said, and an empty one where nothing is said."""
    schema = function.get("parameters")
    if not exact:
        return {"type": "object"}
    if schema is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    where = f"The parameters of the tool `{str(function['name'])[:64]}`"
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{where} must be a JSON schema.", param="tools")
    if schema.get("type", "object") != "object":
        raise InvalidRequest(f"{where} must have the type `object`.", param="tools")
    schema = {"type": "object"} | schema
    try:
        text = msgspec.json.encode(schema).decode()
        limits.read_schema(text)
    except (InvalidRequest, msgspec.MsgspecError, TypeError, ValueError) as error:
        raise InvalidRequest(f"{where} cannot be promised: {error}", param="tools") from None
    return schema
