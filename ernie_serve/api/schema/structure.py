"""What an answer's text must look like, as clients ask for it.

Knows OpenAI's response formats and vLLM's structured outputs. Knows nothing of how grammars are compiled.
"""

import json
import re
from typing import Any

from ernie_serve.api.schema.validation import kind_of
from ernie_serve.errors import InvalidRequest
from ernie_serve.messages import Grammar

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_WANTED = {
    "json": "a JSON schema, as an object or as text",
    "json_object": "true",
    "regex": "a string",
    "choice": "a list of at least one string, and of nothing else",
    "grammar": "a string",
}

RESPONSE_FORMAT = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"enum": ["text", "json_object"]}, "schema": {"type": "object"}},
            "required": ["type"],
        },
        {
            "type": "object",
            "properties": {
                "type": {"enum": ["json_schema"]},
                "json_schema": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "pattern": f"^{_NAME.pattern}$"},
                        "schema": {"type": "object"},
                        "strict": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                    },
                    "required": ["name"],
                },
            },
            "required": ["type", "json_schema"],
        },
    ]
}
"""A response format for the API's own description."""

STRUCTURED_OUTPUTS = {
    "type": "object",
    "properties": {
        "json": {"anyOf": [{"type": "object"}, {"type": "string"}]},
        "json_object": {"type": "boolean"},
        "regex": {"type": "string"},
        "choice": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "grammar": {"type": "string"},
    },
    "minProperties": 1,
    "maxProperties": 1,
}
"""Structured outputs for the API's own description."""


def read_structure(
    response_format: Any, structured_outputs: Any, path: str = "response_format", *, flat: bool = False
) -> tuple[Grammar | None, str]:
    """The grammar of the answer, `None` for any text, and the field that asks for it.

    `path` is the format's own name, and `flat` its form. Raises `InvalidRequest`.
    """
    formatted = read_format(response_format, path, flat=flat)
    if structured_outputs is None:
        return formatted, path
    if formatted is not None:
        told = f"`structured_outputs` and `{path}` both say what the answer looks like. Send one of them."
        raise InvalidRequest(told, param="structured_outputs")
    return _read_outputs(structured_outputs), "structured_outputs"


def read_format(value: Any, path: str = "response_format", *, flat: bool = False) -> Grammar | None:
    """`response_format`: text, json_object, or json_schema, nested as in chat or flat as in Responses.

    A schema binds the answer whether it is strict or not.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InvalidRequest(f"`{path}` must be an object, not {kind_of(value)}.", param=path)
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return _bound_by(value.get("schema"), path)  # which llama.cpp knows
        case "json_schema":
            return _read_schema(value, path) if flat else _read_schema(value.get("json_schema"), f"{path}.json_schema")
    raise InvalidRequest(f"`{path}.type` must be text, json_object or json_schema.", param=f"{path}.type")


def _read_schema(value: Any, path: str) -> Grammar:
    if not isinstance(value, dict):
        raise InvalidRequest(f"`{path}` must be an object, not {kind_of(value)}.", param=path)
    name, schema, strict = value.get("name"), value.get("schema"), value.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        told = f"`{path}.name` must be 1 to 64 letters, digits, underscores or dashes."
        raise InvalidRequest(told, param=f"{path}.name")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequest(f"`{path}.strict` must be true or false, not {kind_of(strict)}.", param=f"{path}.strict")
    return _bound_by(schema, path)


def _bound_by(schema: Any, path: str) -> Grammar:
    if schema is None:
        return Grammar("json_object")
    if not isinstance(schema, dict):
        raise InvalidRequest(f"`{path}.schema` must be an object, not {kind_of(schema)}.", param=f"{path}.schema")
    return Grammar("json_schema", json.dumps(schema))


def _read_outputs(value: Any) -> Grammar | None:
    path = "structured_outputs"
    if not isinstance(value, dict):
        raise InvalidRequest(f"`{path}` must be an object, not {kind_of(value)}.", param=path)
    given = {name: inner for name, inner in value.items() if inner is not None and inner is not False}
    if unknown := sorted(given.keys() - _WANTED.keys()):
        told = f"`{path}.{unknown[0][:40]}` is not supported. Use one of {', '.join(_WANTED)}."
        raise InvalidRequest(told, param=path)
    if len(given) != 1:
        told = f"`{path}` must have exactly one of {', '.join(_WANTED)}, not {len(given)}."
        raise InvalidRequest(told, param=path)
    ((kind, inner),) = given.items()
    match kind, inner:
        case "json", str():
            return Grammar("json_schema", inner)
        case "json", dict():
            return Grammar("json_schema", json.dumps(inner))
        case "json_object", True:
            return Grammar("json_object")
        case "regex", str():
            return Grammar("regex", inner)
        case "choice", list() if inner and all(isinstance(each, str) for each in inner):
            return Grammar("choice", json.dumps(inner))
        case "grammar", str():
            return Grammar("lark", inner)
    told = f"`{path}.{kind}` must be {_WANTED[kind]}."
    raise InvalidRequest(told, param=f"{path}.{kind}")
