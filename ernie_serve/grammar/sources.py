"""From a grammar as the client means it to the text that the compiler reads.

Knows llguidance's input: JSON schema with options, regular expressions, its Lark dialect. Knows no vocabulary but
the ids it is told.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher

from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar import limits, tools
from ernie_serve.messages import Grammar

SPACING: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""At most one space after a comma or colon and no other: no model can spend its answer on white space."""

_ONE_SPELLING: dict[str, Any] = {"json_allowed_escapes": 'nrbtf\\"'}
"""Without `\\uXXXX`, with which a name that is listed could be written once more as one that is not."""


def source(grammar: Grammar, controls: Mapping[int, bytes]) -> str:
    """What `LLMatcher` compiles, in a vocabulary with these control tokens.

    Raises `InvalidRequest` for what is outside the limits or not supported.
    """
    text = grammar.text
    match grammar.kind:
        case "json_object":
            return _json({"type": "object"})
        case "json_schema":
            return _json(limits.read_schema(text))
        case "regex":
            limits.check_pattern(text, "The regular expression", limits.MAX_REGEX)
            return LLMatcher.grammar_from_regex(text)
        case "choice":
            return LLMatcher.grammar_from_regex("|".join(map(literal, _choices(text))))
        case "lark":
            limits.check_size(text, "grammar")
            return LLMatcher.grammar_from_lark(_with_bounded_spaces(text))
        case "tools":
            return LLMatcher.grammar_from_lark(_tools(tools.read(text), controls))


def literal(text: str) -> str:
    """A regular expression that matches a text and nothing else."""
    return "".join(c if c.isascii() and c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text)


def _json(schema: dict[str, Any] | bool) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(_as_object(schema)), overrides=_options(schema))  # type: ignore[arg-type]  # a TypedDict in a stub


def _options(schema: dict[str, Any] | bool) -> dict[str, Any]:
    return SPACING | _ONE_SPELLING if limits.takes_further_names(schema) else SPACING


def _as_object(schema: dict[str, Any] | bool) -> dict[str, Any]:
    """`true` and `false` as schemas that have room for options."""
    if isinstance(schema, dict):
        return schema
    return {} if schema else {"anyOf": []}


def _choices(text: str) -> list[str]:
    limits.check_size(text, "choice")
    choices = limits.read_json(text, "choice")
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) for each in choices):
        raise InvalidRequest("A choice must be a list of at least one string.")
    if len(choices) > limits.MAX_ENUM:
        raise InvalidRequest(f"The choice has {len(choices)} strings; at most {limits.MAX_ENUM} are compiled.")
    if any("\ud800" <= c <= "\udfff" for each in choices for c in each):
        raise InvalidRequest("A choice must be valid Unicode; it has half of a surrogate pair.")
    return choices


def _with_bounded_spaces(lark: str) -> str:
    """A Lark grammar with the options of ours in each `%json`, whose schemas are held to the limits."""
    parts, at = [], 0
    while found := _OPAQUE_OR_JSON.search(lark, at):
        if not found[1]:
            parts.append(lark[at : found.end()])
            at = found.end()
            continue
        try:
            schema, end = json.JSONDecoder().raw_decode(lark, found.end())
        except (ValueError, RecursionError):
            raise InvalidRequest("After `%json` the grammar must have a JSON schema, without comments.") from None
        limits.check_schema(schema)
        parts += [lark[at : found.start()], _inline(schema)]
        at = end
    return "".join([*parts, lark[at:]])


_OPAQUE_OR_JSON = re.compile(
    r"""(?:\#|//)[^\n]*             # a comment
    | "(?:\\.|[^"\\\n])*"?         # a string; one that is not closed is refused by the compiler
    | /(?:\\.|[^/\\])+/?           # a regular expression, also over several lines
    | <[^<>\s]+>                  # a control token
    | (%json\s*)""",
    re.VERBOSE | re.ASCII,  # white space as the compiler has it
)


def _inline(schema: dict[str, Any] | bool) -> str:
    return "%json " + json.dumps(_as_object(schema) | {"x-guidance": _options(schema)})


# Tool calls, in Lark. Text is written as regular expressions, control tokens as ids.


def _tools(spec: tools.ToolGrammar, controls: Mapping[int, bytes]) -> str:
    f = spec.framing
    bodies = " | ".join(f"tool_{index}" for index in range(len(spec.tools)))
    rules = [f"body: {bodies}", f"end: {_mark(f.end, f.end_id)}"]
    for index, tool in enumerate(spec.tools):
        name = json.dumps(tool.name, ensure_ascii=False)
        opening = f'{f.after_begin}{{"name": {name}, "arguments": '
        closing = "}" + f.before_end
        rules.append(f"tool_{index}: {_terminal(opening)} {_inline(tool.arguments)} {_terminal(closing)}")
    if spec.free_text:
        return "\n".join(_among_text(spec, controls) + rules)
    more = f"({_terminal(f.before)} call)*" if spec.parallel else ""
    start = f"start: {_FIRST_BREAKS} call {more}"
    if spec.otherwise is not None:
        form = _beside_calls(spec.otherwise)
        start += " | answer"
        rules.append(f"answer: {form if spec.words is None else _framed(form, spec.words)}")
    call = f"call: {_mark(f.begin, f.begin_id)} body end {_terminal(f.after)}"
    return "\n".join([start, call, *rules])


_FIRST_BREAKS = r"/\n{0,3}/"
"""Line breaks before the first thing of an answer."""


def _framed(form: str, f: tools.Framing) -> str:
    """Words as the model would have written them, which begin and end as its other answers do."""
    begin, end = f"{_mark(f.begin, f.begin_id)} {_terminal(f.after_begin)}", _mark(f.end, f.end_id)
    return f"{_FIRST_BREAKS} {begin} {form} {_terminal(f.before_end)} {end} {_terminal(f.after)}"


def _beside_calls(form: Grammar) -> str:
    match form.kind:
        case "json_object":
            return _inline({"type": "object"})
        case "json_schema":
            return _inline(limits.read_schema(form.text))
        case "choice":
            return f"/{'|'.join(map(literal, _choices(form.text)))}/"
    raise InvalidRequest(
        f"A form of the kind {form.kind!r} cannot be kept together with tools that the model may call or not. Set "
        "`tool_choice` to required or none, or leave one of them out."
    )


def _among_text(spec: tools.ToolGrammar, controls: Mapping[int, bytes]) -> list[str]:
    """Calls in any text with any control tokens; what is spelled like a call's beginning is one, or is not said.

    Nor does a control token that nobody sees part such a spelling.
    """
    f = spec.framing
    tags = (f.begin.encode(), f.end.encode())
    free = [i for i, spelled in sorted(controls.items()) if i not in (f.begin_id, f.end_id) and spelled not in tags]
    seen, hidden = ([i for i in free if (i in f.seen_ids) is is_seen] for is_seen in (True, False))
    pieces = " | ".join(
        f"{text}? <[{','.join(map(str, ids))}]>" for text, ids in (("TEXT", seen), ("NO_TAG", hidden)) if ids
    )
    begun = "|".join(literal(f.begin[:length]) for length in range(1, len(f.begin)))
    begin = f"begin[lazy]: /(?s:.)*{literal(f.begin)}/" if f.begin_id is None else f"begin: TEXT? <[{f.begin_id}]>"
    return [
        f"start: (pieces call){'*' if spec.parallel else '?'} pieces TEXT?",
        f"pieces: ({pieces})*" if pieces else "pieces:",
        "call: begin body end",
        begin,
        f"TEXT: /(?s:.)+/ & ~/(?s:.)*{literal(f.begin)}(?s:.)*/",
        f"NO_TAG: /(?s:.)+/ & ~/(?s:.)*{literal(f.begin)}(?s:.)*/ & ~/(?s:.)*({begun})/",
    ]


def _mark(text: str, token_id: int | None) -> str:
    return _terminal(text) if token_id is None else f"<[{token_id}]>"


def _terminal(text: str) -> str:
    return f"/{literal(text)}/" if text else ""
