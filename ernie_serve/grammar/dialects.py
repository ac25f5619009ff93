"""Other ways to say what a schema says, as schema libraries write them, put into those that the compiler keeps.

Knows tuples of older drafts, names of properties, unions that a tag tells apart, and open ends of ranges. What is put
otherwise means the same; what cannot be is left as it is, to be refused by name.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

_MAX_HOPS = 8
_MAX_TAGS = 8
_MAX_NAMES = 512
_MAX_TOLD = 64 * 1024
"""Bytes that the value of listed names may come to when it is told for each."""
_SAYS_NOTHING = {"title", "description", "default", "examples"}

Schema = dict[str, Any]


def can_settle(root: object) -> bool:
    """Whether no reference in a document leads by its path to what `settle` may put elsewhere."""
    said = root.get("$ref") if isinstance(root, dict) else None
    if isinstance(said, str) and _MOVED.search(said):
        return False
    inside = root.values() if isinstance(root, dict) else root if isinstance(root, list) else ()
    return all(map(can_settle, inside))


_MOVED = re.compile(r"/(oneOf|items|additionalItems|additionalProperties|propertyNames)(/|$)")


def settle(schema: Schema, root: object) -> None:
    """Put one schema, not those in it, otherwise in place; references point into `root`."""
    _settle_tuple(schema, root)
    _settle_names(schema, root)
    _settle_union(schema, root)


def has_fractional_ends(root: object) -> bool:
    """Whether a range of numbers in a document may end between two integers."""
    if not isinstance(root, dict):
        return any(map(has_fractional_ends, root)) if isinstance(root, list) else False
    ends = (root.get(key) for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
    return any(isinstance(end, float) and not end.is_integer() for end in ends) or any(
        map(has_fractional_ends, root.values())
    )


def close_range(schema: Schema) -> None:
    """Let an open end at an integer, the one that is nearer to 0, be a closed one a hair further in.

    From `{"exclusiveMinimum": 0, "maximum": 0.5}` the compiler makes a range that has 0 in it.
    """
    for open_end, closed_end, inner, sign in _ENDS:
        end, other = schema.get(open_end), schema.get(closed_end)
        if isinstance(end, int | float) and end % 1 == 0 and sign * end >= 0 and isinstance(other, int | float | None):
            del schema[open_end]
            end += sign * (_HAIR * math.ulp(end) if end else _NEXT_TO_0)
            schema[closed_end] = end if other is None else inner(end, other)


_ENDS: tuple[tuple[str, str, Callable[[float, float], float], int], ...] = (
    ("exclusiveMinimum", "minimum", max, 1),
    ("exclusiveMaximum", "maximum", min, -1),
)
_HAIR = 4
"""In the last digits of a float: the compiler is wrong in one of them when it reads a number."""
_NEXT_TO_0 = 1e-30
"""It writes an end in digits, and takes no hundred of them."""


def _settle_tuple(schema: Schema, root: object) -> None:
    """A list in `items`, of drafts before 2020-12, is `prefixItems`, and `additionalItems` are what follows it."""
    if not isinstance(schema.get("items"), list) or "prefixItems" in schema:
        return
    if first := schema.pop("items"):
        schema["prefixItems"] = first
    if "additionalItems" in schema:
        schema["items"] = schema.pop("additionalItems")
    if isinstance(root, dict):
        root.pop("$schema", None)  # in the draft that it names, `prefixItems` would say nothing


def _settle_names(schema: Schema, root: object) -> None:
    """Names that may be any are not spoken of; names of a list are properties of their own."""
    if "propertyNames" not in schema:
        return
    said = {} if schema["propertyNames"] is True else _resolved(schema["propertyNames"], root)
    if said is None or said.get("type", "string") != "string":
        return
    binding = said.keys() - _SAYS_NOTHING - {"type"}
    if not binding:
        del schema["propertyNames"]
        return
    names = said.get("enum") if binding == {"enum"} else [said["const"]] if binding == {"const"} else None
    properties, value = schema.get("properties", {}), schema.get("additionalProperties", True)
    if not (isinstance(names, list) and isinstance(properties, dict) and "patternProperties" not in schema):
        return
    listed = {name: copy.deepcopy(value) for name in names if isinstance(name, str)}
    told = json.dumps(value)  # in which nothing is told for each name once more
    if properties.keys() <= listed.keys() and "propertyNames" not in told and len(listed) * len(told) <= _MAX_TOLD:
        del schema["propertyNames"]
        schema["properties"], schema["additionalProperties"] = listed | properties, False


def _settle_union(schema: Schema, root: object) -> None:
    """Where a tag tells the branches of a `oneOf` apart, `anyOf` says the same, once all of them require the tag.

    A tag that has a default is often left out of `required`.
    """
    branches, said = schema.get("oneOf"), schema.pop("discriminator", None)  # beside a union the compiler minds it
    if not isinstance(branches, list) or not branches or "anyOf" in schema:
        return
    variants = [variant for each in branches if (variant := _resolved(each, root)) is not None]
    if len(variants) < len(branches) or not all(map(_is_record, variants)):
        return
    named = said.get("propertyName") if isinstance(said, dict) else None
    tags = [name for name in variants[0]["properties"] if _values(name, variants[0])]
    tags = sorted(tags, key=lambda name: name != named)[:_MAX_TAGS]
    tags.sort(key=lambda name: (name != named, not all(name in each.get("required", ()) for each in variants)))
    for tag in tags:
        if _tells_apart(tag, variants):
            for variant in variants:
                others = [name for name in variant.get("required", ()) if name != tag]
                variant["required"] = [*others, tag]
            schema["anyOf"] = schema.pop("oneOf")
            return


def _is_record(schema: Schema) -> bool:
    """Whether it is of objects alone, with properties."""
    shaped = isinstance(schema.get("properties"), dict) and isinstance(schema.get("required", []), list)
    small = shaped and len(schema["properties"]) + len(schema.get("required", [])) <= _MAX_NAMES
    return small and schema.get("type") == "object"


def _tells_apart(name: str, variants: Sequence[Schema]) -> bool:
    """Whether a property has values in each of these that it has in no other."""
    seen: set[str] = set()
    for variant in variants:
        values = _values(name, variant)
        if not values or not seen.isdisjoint(values):
            return False
        seen |= values
    return True


def _values(name: str, variant: Schema) -> set[str]:
    """The texts that a property is one of; none where it may be something else."""
    said = variant["properties"].get(name)
    values = [] if not isinstance(said, dict) else [said["const"]] if "const" in said else said.get("enum")
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        return set()
    return set(values)


def _resolved(schema: object, root: object) -> Schema | None:
    """The schema that a reference, or a chain of them, comes to; `None` where it comes to no object."""
    for _ in range(_MAX_HOPS):
        if not isinstance(schema, dict):
            return None
        if "$ref" not in schema:
            return schema
        if schema.keys() - _SAYS_NOTHING - {"$ref"}:
            return None  # what stands beside a reference binds too
        schema = _pointed_at(schema["$ref"], root)
    return None


def _pointed_at(reference: object, root: object) -> object:
    if reference == "#":
        return root
    start, _, name = reference.rpartition("/") if isinstance(reference, str) else ("", "", "")
    named = root.get(start[2:]) if start in ("#/$defs", "#/definitions") and isinstance(root, dict) else None
    return named.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(named, dict) else None
