"""A name that an object lists is spelled in one way, whatever other names it takes."""

import json
import re

import pytest
from jsonschema import Draft202012Validator

from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar import limits
from ernie_serve.grammar.tools import Framing, tool_grammar
from ernie_serve.messages import Grammar

NAMES = [
    "a",
    "name",
    "é",
    "日本",
    "😀",
    "/",
    'q"',
    "\\",
    "\\u0061",
    "a b",
    "",
    "\n",
    "\b\f\r\t",
    "\x01",
    "\x7f",
    "\u2028",
]
OTHERS = [{}, {"additionalProperties": {"type": "boolean"}}, {"patternProperties": {"^z": {"type": "boolean"}}}]


def json_schema(schema):
    return Grammar("json_schema", json.dumps(schema))


def call_of(schema):
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return tool_grammar([tool], Framing(), parallel=False)


def call(arguments):
    return f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>\n'


def spellings(name):
    """The ways in which JSON writes a name: plain, and with every character escaped."""
    units = [name.encode("utf-16-be")[at : at + 2].hex() for at in range(0, len(name.encode("utf-16-be")), 2)]
    escaped = "".join(rf"\u{unit}" for unit in units)
    return {
        json.dumps(name, ensure_ascii=False),
        json.dumps(name),
        f'"{escaped}"',
        f'"{escaped.upper()}"'.replace("U", "u"),
    }


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("others", OTHERS, ids=str)
def test_a_listed_name_is_held_to_its_schema_however_it_is_spelled(allows, name, others):
    schema = {"type": "object", "properties": {name: {"type": "integer"}}} | others
    plain = json.dumps(name, ensure_ascii=False)
    assert allows(json_schema(schema), f"{{{plain}:1}}")
    assert allows(call_of(schema), call(f"{{{plain}:1}}"))
    for spelled in spellings(name):
        assert json.loads(spelled) == name
        for grammar, text in ((json_schema(schema), "{}"), (call_of(schema), call("{}"))):
            assert not allows(grammar, text.replace("{}", f"{{{spelled}:true}}"))
            assert not allows(grammar, text.replace("{}", f"{{{plain}:1,{spelled}:true}}"))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("\x01", "\x7f"))], ids=ascii)
def test_further_names_may_be_any(allows, name):
    schema = json_schema({"type": "object", "properties": {"other": {"type": "integer"}}})
    assert allows(schema, f"{{{json.dumps(name, ensure_ascii=False)}:true}}")


def test_a_name_that_a_pattern_takes_is_held_to_it_however_it_is_spelled(allows):
    schema = json_schema({"type": "object", "patternProperties": {"^x": {"type": "integer"}}})
    assert allows(schema, '{"x1":1,"y":true}')
    assert not allows(schema, r'{"\u0078":true}')
    closed = {
        "properties": {"a\n": {"type": "integer"}},
        "patternProperties": {"^a": {}},
        "additionalProperties": False,
    }
    assert allows(json_schema({"type": "object", **closed}), r'{"a\n":1}')
    assert not allows(json_schema({"type": "object", **closed}), r'{"a\u000a":true}')


@pytest.mark.parametrize("text", [r'"\u001b[0m"', r'{"\u0000":"\u007f"}'])
def test_where_no_name_is_listed_control_characters_can_be_written(allows, text):
    assert allows(json_schema({"type": ["string", "object"]}), text)


OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "value", [{"const": "a\x01"}, {"enum": ["b", ["\x7f"]]}, {"patternProperties": {"^\x02$": {}}}]
)
def test_control_characters_beside_further_names_are_refused_by_name(compiler, value):
    closed = OPEN | {"additionalProperties": False}
    with pytest.raises(InvalidRequest, match="control character"):
        limits.check_schema({"anyOf": [value, OPEN]})
    if "patternProperties" not in value:
        compiler.check(json_schema({"anyOf": [value, closed]}))


@pytest.mark.parametrize("pattern", [r"^a\x01?b$", r"^a(\v|c)b$", "^a\x02?b$", r"^[^\x00-\x1f]{2}$", r"^a[\u0000-z]$"])
@pytest.mark.parametrize("text", ["ab", "acb", "a", "b", "az"])
def test_a_pattern_that_speaks_of_control_characters_is_kept_beside_further_names(allows, pattern, text):
    schema = {"anyOf": [{"type": "string", "pattern": pattern}, OPEN]}
    assert allows(json_schema(schema), f'"{text}"') == bool(re.search(pattern, text))
    assert allows(json_schema(schema), f'"{text}"') == Draft202012Validator(schema).is_valid(text)


@pytest.mark.parametrize(
    ("pattern", "refused"),
    [
        (r"^[\x20-\x7e]+$", False),
        (r"^[\u0020-\u007e]+$", False),
        (r"^[\x{4e00}-\x{9fa5}]+$", False),
        (r"^\x09a$", False),
        (r"^[^\\x00]$", False),
        (r"^[^\x00-\x1f]+$", True),
        (r"^\x{1}$", True),
        (r"^a\v$", True),
    ],
)
def test_only_a_character_that_cannot_be_written_is_refused_in_a_name(pattern, refused):
    schema = {"type": "object", "patternProperties": {pattern: {"type": "string"}}}
    if not refused:
        return limits.check_schema(schema)
    with pytest.raises(InvalidRequest, match="control character"):
        limits.check_schema(schema)
    return None


def test_what_is_said_once_for_many_names_stays_small():
    """As pydantic writes `dict[Enum, constr(pattern=…)]`."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}},
        "required": ["name"],
    }
    notes = {
        "type": "object",
        "propertyNames": {"enum": [f"n{i}" for i in range(14)]},
        "additionalProperties": {"type": "string", "pattern": r"^[^\x00-\x1f]*$"},
    }
    schema["properties"]["notes"] = notes
    limits.check_schema(schema)
    once = json.dumps(schema)
    assert len(once) < 10_000
    limits.check_schema(schema)
    assert json.dumps(schema) == once, "nothing is said again"


def test_a_property_called_like_a_keyword_opens_nothing(compiler):
    schema = {
        "type": "object",
        "properties": {"required": {"type": "boolean"}, "sep": {"const": "\x1f"}},
        "required": ["required", "sep"],
        "additionalProperties": False,
    }
    compiler.check(json_schema(schema))


def test_tuples_of_older_drafts_are_looked_into():
    with pytest.raises(InvalidRequest, match="control character"):
        limits.check_schema({"type": "array", "items": [{"const": "a\x01"}, OPEN]})
