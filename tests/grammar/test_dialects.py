"""What schema libraries write means here what it means to them."""

import itertools
import json

import pytest
from jsonschema import Draft7Validator, Draft202012Validator

from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar import limits
from ernie_serve.messages import Grammar

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
BOOLEAN = {"type": "boolean"}


def record(**properties):
    """An object as pydantic writes it, whose tag `kind` has a default and so is not required."""
    required = [name for name in properties if name != "kind"]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def tag(name):
    return {"const": name, "default": name, "type": "string"}


def union(*names):
    mapping = {name.lower(): f"#/$defs/{name}" for name in names}
    branches = [{"$ref": reference} for reference in mapping.values()]
    return {"oneOf": branches, "discriminator": {"propertyName": "kind", "mapping": mapping}}


PETS = {
    "$defs": {"Cat": record(kind=tag("cat"), lives=BOOLEAN), "Dog": record(kind=tag("dog"), barks=BOOLEAN)},
    **record(pet=union("Cat", "Dog")),
}
TREE = {
    "$defs": {
        "Leaf": record(kind=tag("leaf"), value=BOOLEAN),
        "Node": record(kind=tag("node"), children={"type": "array", "items": union("Leaf", "Node"), "maxItems": 1}),
    },
    "$ref": "#/$defs/Node",
}
UNTOLD = {**PETS, "properties": {"pet": {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]}}}
OPEN = {
    "oneOf": [
        {"type": "object", "properties": {"kind": tag("cat"), "lives": BOOLEAN}, "required": ["lives"]},
        {"type": "object", "properties": {"kind": tag("dog"), "barks": BOOLEAN}, "required": ["barks"]},
    ]
}
TAGGED = {
    "oneOf": [
        {"type": "object", "properties": {"a": {"const": "x"}, "next": {"$ref": "#"}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"enum": ["y", "z"]}}, "required": ["a"]},
    ]
}
RECORD = {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": BOOLEAN}
NAMED = {
    "type": "object",
    "propertyNames": {"type": "string", "enum": ["a", "b"]},
    "additionalProperties": BOOLEAN,
    "required": ["a"],
}
NAMED_ELSEWHERE = {
    "$defs": {"Name": {"enum": ["a", "b"], "title": "Name"}},
    **NAMED,
    "propertyNames": {"$ref": "#/$defs/Name"},
}
TUPLE = {
    "$schema": DRAFT_7,
    "type": "array",
    "items": [BOOLEAN, {"type": "integer"}],
    "additionalItems": False,
    "minItems": 2,
}
TUPLE_WITH_REST = {
    "$schema": DRAFT_7,
    "type": "array",
    "items": [BOOLEAN],
    "additionalItems": {"type": "null"},
    "minItems": 2,
    "maxItems": 3,
}


@pytest.mark.parametrize(
    "schema",
    [PETS, TREE, UNTOLD, OPEN, TAGGED, RECORD, NAMED, NAMED_ELSEWHERE, TUPLE, TUPLE_WITH_REST],
    ids=["pets", "tree", "untold", "open", "tagged", "record", "named", "named elsewhere", "tuple", "tuple with rest"],
)
def test_what_libraries_write_is_compiled_and_kept(compiler, answer, schema):
    grammar, num_whole = Grammar("json_schema", json.dumps(schema)), 0
    compiler.check(grammar)
    validator = (Draft7Validator if schema.get("$schema") == DRAFT_7 else Draft202012Validator)(schema)
    for seed in range(12):
        said = answer(grammar, seed)
        if said.is_whole:
            validator.validate(json.loads(said.text))
            num_whole += 1
    assert num_whole


@pytest.mark.parametrize("schema", [PETS, UNTOLD])
def test_a_tag_is_always_said(answer, schema):
    texts = [
        said.text for seed in range(12) if (said := answer(Grammar("json_schema", json.dumps(schema)), seed)).is_whole
    ]
    assert {json.loads(text)["pet"]["kind"] for text in texts} == {"cat", "dog"}


def nested_names(levels):
    """Names of a list at each level: put otherwise, each level would hold the next one twice."""
    schema = {"const": [0] * 1000}
    for _ in range(levels):
        schema = {"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"propertyNames": {"minLength": 2}}, "propertyNames"),
        ({"propertyNames": {"enum": ["a"]}, "properties": {"b": {}}}, "propertyNames"),
        ({"propertyNames": {"enum": ["a"]}, "patternProperties": {"b": {}}}, "propertyNames"),
        ({"propertyNames": {"$ref": "#/$defs/none"}}, "propertyNames"),
        ({"propertyNames": {"enum": list("abcdefgh")}, "additionalProperties": {"title": "b" * 9000}}, "propertyNames"),
        (
            {"$defs": {"N": {"type": "string"}}, "propertyNames": {"$ref": "#/$defs/N", "pattern": "^a$"}},
            "propertyNames",
        ),
        (nested_names(10), "propertyNames"),
        ({"additionalItems": False}, "additionalItems"),
        ({"items": [{}], "prefixItems": [{}]}, "items"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_said_otherwise_is_refused_by_name(schema, keyword):
    with pytest.raises(InvalidRequest, match=f"`{keyword}`"):
        limits.check_schema(schema)


@pytest.mark.parametrize(
    "branches",
    [
        [
            {"properties": {"a": {"const": "x"}}, "required": ["a"]},
            {"properties": {"a": {"const": "y"}}, "required": ["a"]},
        ],
        [record(kind=tag("cat")), record(kind=tag("cat"))],
        [record(kind=tag("cat")), record(kind={"type": "string"})],
        [record(kind=tag("cat")), {"$ref": "#/oneOf/1"}],
        [record(kind=tag("cat")), {"$ref": "#/oneOf/0"}],
        [record(kind=tag("cat")), True],
    ],
    ids=lambda value: str(value)[:60],
)
def test_branches_that_no_tag_tells_apart_stay_as_they_are(branches):
    schema = {"oneOf": branches}
    limits.check_schema(schema)
    assert "oneOf" in schema


def test_a_tag_is_found_behind_others_where_it_is_named():
    branches = [
        record(**{f"other{i}": {"enum": ["a", "b"]} for i in range(9)}, kind=tag(name)) for name in ("cat", "dog")
    ]
    schema = {"oneOf": branches, "discriminator": {"propertyName": "kind"}}
    limits.check_schema(schema)
    assert all("kind" in each["required"] for each in schema["anyOf"])


def test_a_constant_is_no_schema_whatever_points_at_it():
    constant = {"type": "object", "properties": {"k": {"const": "x"}}}
    schema = {"properties": {"x": {"const": constant}}, "oneOf": [{"$ref": "#/properties/x/const"}]}
    before = json.dumps(constant)
    limits.check_schema(schema)
    assert json.dumps(constant) == before


def test_references_into_what_would_be_renamed_still_lead_there(compiler):
    tagged = [record(name=tag(name)) for name in ("cat", "dog")]
    schema = {"type": "object", "properties": {"a": {"oneOf": tagged}, "b": {"$ref": "#/properties/a/oneOf/0"}}}
    limits.check_schema(schema)
    assert "oneOf" in schema["properties"]["a"]


def test_a_reference_into_what_is_being_read_harms_nobody():
    schema = {
        "properties": {
            "a": {"oneOf": [{"$ref": "#/properties"}], "discriminator": {"propertyName": "kind"}},
            "type": "object",
            "properties": {"kind": {"const": "x"}},
        }
    }
    with pytest.raises(InvalidRequest, match="must be an object"):
        limits.check_schema(schema)


ENDS = [None, 0, 1, -1, 0.5, -0.5, 1.5, -1.5, 2, 1e-6]
NUMBERS = [
    "-2",
    "-1.5",
    "-1.25",
    "-1",
    "-0.5",
    "-0.25",
    "-0.000001",
    "-0",
    "0",
    "0.0",
    "0.000001",
    "0.25",
    "0.5",
    "0.9",
]
NUMBERS += ["1", "1.0", "1.00001", "1.25", "1.5", "1.75", "2", "2.25", "3"]


@pytest.mark.parametrize("kind", ["number", "integer"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_range_has_its_open_ends_not_in_it(allows, kind, nested):
    lows, highs = (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    for low, high, least, most in itertools.product(lows, highs, ENDS, ENDS):
        first, second = ({key: end} if end is not None else {} for key, end in ((low, least), (high, most)))
        schema = {"type": kind, **second, **({"allOf": [first]} if nested else first)}
        validator = Draft202012Validator(schema)
        valid = {text for text in NUMBERS if validator.is_valid(json.loads(text))}
        if not valid:
            continue  # which may be refused
        taken = {text for text in NUMBERS if allows(Grammar("json_schema", json.dumps(schema)), text)}
        assert taken <= valid, schema
        spelled_otherwise = {"-0", "0.0", "1.0"} if kind == "number" else {"-0"} | {n for n in NUMBERS if "." in n}
        assert valid - taken <= spelled_otherwise, schema


@pytest.mark.parametrize("end", [0.5, 0, 7])
def test_an_open_end_stays_as_it_is_where_the_compiler_keeps_it(end):
    schema = {
        "properties": {"a": {"exclusiveMaximum": 1}, "b": {"exclusiveMinimum": -1}, "c": {"exclusiveMinimum": end}}
    }
    before = json.dumps(schema)
    limits.check_schema(schema)
    assert json.dumps(schema) == before
