"""The grammar of an answer that either calls functions or is a text of a given form.

Knows how calls are framed and how forms are spelled in Lark. Knows nothing of requests; what it writes is held to the
same limits as a grammar that a client wrote.
"""

import json
from typing import Any

from ernie_serve.api.schema.tools import ToolUse
from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar.limits import read_schema
from ernie_serve.grammar.sources import literal
from ernie_serve.grammar.tools import ToolFraming
from ernie_serve.messages import Grammar


def calls_or(use: ToolUse, framing: ToolFraming, form: Grammar, param: str) -> Grammar:
    """Calls of the functions that may be called, or a text of this form, and nothing else.

    Arguments satisfy the parameters of tools that are strict, and are any object for others. Raises `InvalidRequest`
    for a form that cannot stand beside calls.
    """
    f = framing
    functions = [tool["function"] for tool in use.tools if tool["function"]["name"] in use.names]
    rules = [
        f"start: /\\n{{0,3}}/ call {f'({_text(f.before)} call)*' if use.parallel else ''} | answer",
        f"call: {_mark(f.begin, f.begin_id)} body {_mark(f.end, f.end_id)} {_text(f.after)}",
        f"body: {' | '.join(f'tool_{index}' for index in range(len(functions)))}",
        f"answer: {_answer(form, param)}",
    ]
    for index, function in enumerate(functions):
        name = json.dumps(function["name"])
        opening, closing = f'{f.after_begin}{{"name": {name}, "arguments": ', "}" + f.before_end
        rules.append(f"tool_{index}: {_text(opening)} %json {json.dumps(_arguments(function))} {_text(closing)}")
    return Grammar("lark", "\n".join(rules))


def _answer(form: Grammar, param: str) -> str:
    match form.kind:
        case "json_object":
            return '%json {"type": "object"}'
        case "json_schema":
            return f"%json {json.dumps(read_schema(form.text))}"
        case "choice":
            return f"/{'|'.join(literal(each) for each in json.loads(form.text))}/"
    told = (
        f"`{param}` of the kind {form.kind!r} cannot be kept together with tools that the model may call or not. Set "
        "`tool_choice` to required or none, or leave one of them out."
    )
    raise InvalidRequest(told, param=param)


def _arguments(function: dict[str, Any]) -> dict[str, Any]:
    if not function.get("strict"):
        return {"type": "object"}
    schema = {"type": "object", **(function.get("parameters") or {})}
    if schema["type"] != "object":
        told = f"The parameters of the tool `{function['name']}` must have the type `object`."
        raise InvalidRequest(told, param="tools")
    return schema


def _mark(text: str, token_id: int | None) -> str:
    return _text(text) if token_id is None else f"<[{token_id}]>"


def _text(text: str) -> str:
    return f"/{literal(text)}/" if text else ""
