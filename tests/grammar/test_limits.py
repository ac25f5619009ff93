"""What is refused before anything is compiled, and by which name."""

import json

import pytest

from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar import limits


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "keyword",
    [
        *("not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired"),
        *("dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems", "additionalItems"),
        *("$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "extends", "disallow"),
        *("divisibleBy", "x-guidance"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"properties": {"a": {"items": s}}}, lambda s: {"anyOf": [s]}])
def test_a_keyword_that_would_be_dropped_is_refused_by_name_wherever_it_stands(keyword, wrap):
    with pytest.raises(InvalidRequest) as caught:
        limits.check_schema(wrap({keyword: {}}))
    assert f"`{keyword}`" in caught.value.message


@pytest.mark.parametrize("keyword", ["uniqueItems", "nullable"])
def test_a_keyword_that_says_nothing_is_let_through(keyword):
    limits.check_schema({keyword: False})
    with pytest.raises(InvalidRequest, match=keyword):
        limits.check_schema({keyword: True})


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ({"propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"items": [{}], "prefixItems": [{}]}, "`items` as a list"),
        ({"exclusiveMinimum": True}, "exclusiveMinimum"),
        ({"properties": {"a": {"required": True}}}, "required"),
        ({"$ref": "http://example.com/schema"}, "ref"),
        ({"$ref": 3}, "ref"),
        ({"properties": {"a": {"$id": "x"}}}, "id"),
        ({"minProperties": 2}, "minProperties"),
        ({"required": ["a", "b"], "minProperties": 3}, "minProperties"),
        ({"properties": []}, "properties"),
        ({"anyOf": {}}, "anyOf"),
        ({"enum": "ab"}, "enum"),
        ({"pattern": 3}, "pattern"),
        ({"items": 3}, "items"),
        ({"const": 2**53 + 1}, "const"),
        ({"enum": [1, {"a": [-(2**60)]}]}, "enum"),
        ({"maximum": 2**63 - 1}, "maximum"),
        ({"minimum": -1e400}, "minimum"),
    ],
)
def test_what_is_wrong_is_named(schema, name):
    with pytest.raises(InvalidRequest, match=name):
        limits.check_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "root", "title": "T", "x-order": 3},
        {"required": ["a", "b"], "minProperties": 2},
        {"default": {"not": {}}, "const": {"if": 1}, "enum": [{"contains": 2}], "examples": [{"not": 1}]},
        {"properties": {"not": {"type": "string"}, "if": {}}},
    ],
)
def test_annotations_and_data_are_no_keywords(schema):
    limits.check_schema(schema)


@pytest.mark.parametrize(
    ("limit", "within", "beyond"),
    [
        (limits.MAX_DEPTH, nested(limits.MAX_DEPTH), nested(limits.MAX_DEPTH + 1)),
        (
            limits.MAX_NODES,
            {"properties": {str(i): {} for i in range(limits.MAX_NODES - 1)}},
            {"properties": {str(i): {} for i in range(limits.MAX_NODES)}},
        ),
        (
            limits.MAX_ENUM,
            {"anyOf": [{"enum": [0] * 1000}, {"enum": [0] * (limits.MAX_ENUM - 1000)}]},
            {"anyOf": [{"enum": [0] * 1000}, {"enum": [0] * (limits.MAX_ENUM - 999)}]},
        ),
        (limits.MAX_PATTERN, {"pattern": "a" * limits.MAX_PATTERN}, {"pattern": "a" * (limits.MAX_PATTERN + 1)}),
        (
            limits.MAX_PATTERN,
            {"patternProperties": {"a" * limits.MAX_PATTERN: {}}},
            {"patternProperties": {"a" * (limits.MAX_PATTERN + 1): {}}},
        ),
        (
            limits.MAX_PATTERN_PROPERTIES,
            {"patternProperties": {str(i): {} for i in range(limits.MAX_PATTERN_PROPERTIES)}},
            {"patternProperties": {str(i): {} for i in range(limits.MAX_PATTERN_PROPERTIES + 1)}},
        ),
    ],
)
def test_each_limit_lets_its_number_through_and_no_more(limit, within, beyond):
    limits.check_schema(within)
    with pytest.raises(InvalidRequest, match=str(limit)):
        limits.check_schema(beyond)


def test_a_format_that_nobody_knows_binds_nothing():
    schema = limits.read_schema(
        json.dumps({"properties": {"format": {"type": "string", "format": "int32"}, "day": {"format": "date"}}})
    )
    assert schema == {"properties": {"format": {"type": "string"}, "day": {"format": "date"}}}


def test_a_schema_is_measured_in_bytes_before_it_is_read():
    limits.read_schema('{"title": "' + "a" * (limits.MAX_BYTES - 13) + '"}')
    with pytest.raises(InvalidRequest, match=str(limits.MAX_BYTES)):
        limits.read_schema('{"title": "' + "é" * (limits.MAX_BYTES // 2) + '"}')


@pytest.mark.parametrize("text", ["", "{", "[" * 60000, "[" * 2000 + "]" * 2000, "NaN", '{"minimum": Infinity}', "3"])
def test_what_is_no_schema_is_refused(text):
    with pytest.raises(InvalidRequest):
        limits.read_schema(text)


def test_data_may_not_be_nested_without_bound():
    with pytest.raises(InvalidRequest, match="levels deep"):
        limits.read_schema('{"const": ' + "[" * 500 + "]" * 500 + "}")


def test_long_names_are_cut_in_messages():
    with pytest.raises(InvalidRequest) as caught:
        limits.check_schema({"properties": {"n" * 5000: {"not": {}}}})
    assert len(caught.value.message) < 300


def test_the_walk_reads_what_json_can_hold():
    assert limits.read_schema(json.dumps({"type": ["string", "null"]})) == {"type": ["string", "null"]}
