"""What a schema, pattern or grammar may ask for before anything is compiled.

Knows JSON schema's keywords and how large a thing may be. Knows nothing of how grammars are compiled. Everything
refused is refused by name: a keyword that would be dropped would be a promise broken silently. Only a format that
nobody here knows is dropped: it promises nothing.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar.dialects import can_settle, close_range, has_fractional_ends, settle

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_NODES = 4096
MAX_ENUM = 2000
MAX_PATTERN = 512
MAX_REGEX = 2048
MAX_PATTERN_PROPERTIES = 16
MAX_NUMBER = 2**53

_JSON_DEPTH = 3 * MAX_DEPTH
_ONE = ("items", "additionalProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_REFUSED = {
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"),
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
    *("additionalItems", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"),
    *("extends", "disallow", "divisibleBy", "nullable", "x-guidance"),
}


FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
"""The formats of strings that are kept. Any other binds nothing, as JSON Schema has it of unknown ones."""

_NUMBERS = {"const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}


def read_schema(text: str) -> dict[str, Any] | bool:
    """A JSON schema within the limits. Raises `InvalidRequest`, which names the keyword or the limit."""
    check_size(text, "schema")
    schema = read_json(text, "schema")
    check_schema(schema)
    assert isinstance(schema, dict | bool), "a checked schema"
    return schema


def check_schema(schema: object) -> None:
    """Raise `InvalidRequest` unless a parsed schema is within the limits and every keyword in it is kept.

    Formats that are not known are taken out of it, and what is said otherwise than the compiler reads it is put so.
    """
    walk = _Walk(
        schema,
        settles=can_settle(schema),
        closes=has_fractional_ends(schema),
        no_controls=takes_further_names(schema),
    )
    walk.visit(schema, "#", 1)


def takes_further_names(schema: object) -> bool:
    """Whether some object may list names and take others too. Its strings then have no `\\uXXXX` in them.

    So they hold no control character but \\b, \\f, \\n, \\r and \\t, and neither may what they are held to.
    """
    if not isinstance(schema, dict):
        return False
    lists = bool(schema.get("properties") or schema.get("required"))
    if schema.get("patternProperties") or (lists and schema.get("additionalProperties") is not False):
        return True
    return any(map(takes_further_names, _parts(schema)))


def _parts(schema: dict[str, Any]) -> Iterator[object]:
    """The schemas in a schema, whatever keywords they stand under."""
    for key, value in schema.items():
        if key in _MAPS:
            yield from value.values() if isinstance(value, dict) else ()
        elif key not in _NO_SCHEMAS:
            yield from value if isinstance(value, list) else (value,)


_NO_SCHEMAS = frozenset({"const", "enum", "default", "examples", "required"})


def check_size(text: str, what: str) -> None:
    """Raise `InvalidRequest` if a text is longer than what is compiled at all."""
    if (size := len(text.encode("utf-8", "replace"))) > MAX_BYTES:
        raise InvalidRequest(f"The {what} has {size} bytes; at most {MAX_BYTES} are compiled. Make it smaller.")


def check_pattern(pattern: object, where: str, limit: int = MAX_PATTERN) -> None:
    """Raise `InvalidRequest` unless this is a regular expression of a length that is compiled."""
    if not isinstance(pattern, str):
        raise InvalidRequest(f"{where} must be a string that holds a regular expression.")
    if len(pattern) > limit:
        raise InvalidRequest(f"{where} has {len(pattern)} characters; a pattern has at most {limit}.")


def read_json(text: str, what: str) -> object:
    """Parse JSON of bounded nesting. Raises `InvalidRequest`."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(f"The {what} is not JSON: {reason}.") from None
    level: list[object] = [value]
    for _ in range(_JSON_DEPTH):
        level = [child for each in level for child in _children(each)]
        if not level:
            return value
    raise InvalidRequest(f"The {what} is nested more than {_JSON_DEPTH} levels deep. Flatten it.")


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _largest(value: object) -> float:
    """The largest absolute value of the numbers in a JSON value."""
    if isinstance(value, int | float):
        return abs(value)
    return max(map(_largest, _children(value)), default=0)


def _is_plain(value: object) -> bool:
    """Whether no text in a JSON value has a control character that only `\\uXXXX` can write."""
    return not _CONTROL.search(value) if isinstance(value, str) else all(map(_is_plain, _children(value)))


_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_NO_CONTROLS = rf"^[^{_CONTROL.pattern[1:]}*$"
_KEPT_OUT = {"pattern": _NO_CONTROLS}
_ESCAPED = re.compile(
    r"\\(?:[xu]\{([0-9A-Fa-f]+)\}|x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL
)


def _spells_control(pattern: str) -> bool:
    """Whether a pattern names such a character; the compiler would take it for no character at all."""
    for *codes, letter in _ESCAPED.findall(pattern):
        code = next(filter(None, codes), None)
        if letter in ("a", "v") or (code and int(code, 16) < 128 and _CONTROL.search(chr(int(code, 16)))):
            return True
    return bool(_CONTROL.search(pattern))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


@dataclass(slots=True)
class _Walk:
    """One pass over a schema, counting."""

    root: object
    settles: bool
    closes: bool
    no_controls: bool
    num_nodes: int = 0
    num_enum: int = 0

    def visit(self, schema: object, where: str, depth: int) -> None:
        self.num_nodes += 1
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"The schema is nested more than {MAX_DEPTH} levels deep. Flatten it.")
        if self.num_nodes > MAX_NODES:
            raise InvalidRequest(f"The schema has more than {MAX_NODES} subschemas. Make it smaller.")
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise InvalidRequest(f"The schema at {where} must be an object, true or false.")
        if self.settles:
            settle(schema, self.root)
        self._check_keywords(schema, where)
        if self.closes:
            close_range(schema)
        if self.no_controls:
            self._refuse_controls(schema, where)
        if isinstance(named := schema.get("format"), str) and named not in FORMATS:
            del schema["format"]  # to JSON Schema an annotation, to the library an error
        for key in _ONE:
            if key in schema:
                self.visit(schema[key], f"{where}/{key}", depth + 1)
        for key in _LISTS:
            for index, each in enumerate(self._expect(schema, key, list, where)):
                self.visit(each, f"{where}/{key}/{index}", depth + 1)
        for key in _MAPS:
            for name, each in list(self._expect(schema, key, dict, where).items()):  # `settle` may add to it
                self.visit(each, f"{where}/{key}/{name[:64]}", depth + 1)
        pattern, bounds = schema.get("pattern", ""), schema.get("allOf", [])
        if self.no_controls and pattern != _NO_CONTROLS and _spells_control(pattern) and _KEPT_OUT not in bounds:
            schema["allOf"] = [*bounds, _KEPT_OUT]

    def _expect(self, schema: dict[str, Any], key: str, kind: type, where: str) -> Any:
        value = schema.get(key, kind())
        if not isinstance(value, kind):
            raise InvalidRequest(f"`{key}` at {where} must be {'a list' if kind is list else 'an object'}.")
        return value

    def _check_keywords(self, schema: dict[str, Any], where: str) -> None:
        for key in _REFUSED & schema.keys():
            if schema[key] is not False or key not in ("uniqueItems", "nullable"):
                raise InvalidRequest(f"The schema keyword `{key}` (at {where}) is not supported. Remove it.")
        if isinstance(schema.get("items"), list):
            raise InvalidRequest(f"`items` as a list (at {where}) is not supported. Use `prefixItems`.")
        for key in ("exclusiveMinimum", "exclusiveMaximum", "required"):
            if isinstance(schema.get(key), bool):
                raise InvalidRequest(f"`{key}` as true or false (at {where}) is of an old draft and not supported.")
        if "$id" in schema and where != "#":
            raise InvalidRequest(f"The schema keyword `$id` (at {where}) is supported at the root only.")
        reference = schema.get("$ref", "#")
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise InvalidRequest(f"`$ref` at {where} must point into this schema, as in `#/$defs/name`.")
        self.num_enum += len(self._expect(schema, "enum", list, where))
        if self.num_enum > MAX_ENUM:
            raise InvalidRequest(f"The schema's enums have more than {MAX_ENUM} values together. Use fewer.")
        check_pattern(schema.get("pattern", ""), f"`pattern` at {where}")
        self._check_counts(schema, where)
        for key in _NUMBERS & schema.keys():
            if _largest(schema[key]) > MAX_NUMBER:
                raise InvalidRequest(
                    f"`{key}` at {where} has a number beyond 2^53, which cannot be kept exactly. Leave it out."
                )

    def _refuse_controls(self, schema: dict[str, Any], where: str) -> None:
        said = {key: schema[key] for key in ("const", "enum") if not _is_plain(schema.get(key))}
        for key in [*said, *filter(_spells_control, schema.get("patternProperties", ()))]:
            raise InvalidRequest(
                f"`{key[:64]}` (at {where}) has a control character. It is supported only where every object that "
                "lists names takes no others: set `additionalProperties` to false, and leave out `patternProperties`."
            )

    def _check_counts(self, schema: dict[str, Any], where: str) -> None:
        patterns = self._expect(schema, "patternProperties", dict, where)
        if len(patterns) > MAX_PATTERN_PROPERTIES:
            raise InvalidRequest(f"`patternProperties` at {where} has more than {MAX_PATTERN_PROPERTIES} patterns.")
        for pattern in patterns:
            check_pattern(pattern, f"A pattern of `patternProperties` at {where}")
        # Names that no keyword lists may come twice, so their number says little.
        sure = max(1, len(self._expect(schema, "required", list, where)))
        least = schema.get("minProperties", 0)
        if isinstance(least, int | float) and least > sure:
            raise InvalidRequest(
                f"`minProperties` above 1 (at {where}) is not supported beyond what `required` names. Name them there."
            )
