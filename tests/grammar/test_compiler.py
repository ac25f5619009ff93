"""Whatever chance says under a grammar is what the grammar means."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar.compiler import GrammarCompiler, Vocabulary
from ernie_serve.grammar.tools import Framing, tool_grammar
from ernie_serve.messages import Grammar

QUIET = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def json_schema(schema):
    return Grammar("json_schema", json.dumps(schema))


NAMES = st.sampled_from(["a", "b", "name", "city id", "é", 'q"uote', "日本"])
LEAVES = st.one_of(
    st.just({}),
    st.just(True),
    st.sampled_from(["string", "number", "integer", "boolean", "null", "object", "array"]).map(lambda t: {"type": t}),
    st.just({"type": ["integer", "null"]}),
    st.builds(
        lambda lo, n: {"type": "integer", "minimum": lo, "maximum": lo + n}, st.integers(-50, 50), st.integers(0, 9)
    ),
    st.builds(
        lambda lo, n: {"type": "number", "exclusiveMinimum": lo, "maximum": lo + n},
        st.integers(-5, 5),
        st.integers(1, 9),
    ),
    st.builds(lambda n: {"type": "integer", "multipleOf": n}, st.integers(1, 12)),
    st.builds(
        lambda lo, n: {"type": "string", "minLength": lo, "maxLength": lo + n}, st.integers(0, 5), st.integers(0, 5)
    ),
    st.sampled_from(["^[a-c]{2,4}$", "x+y?", "^(ja|nein)", r"\d{3}"]).map(lambda p: {"type": "string", "pattern": p}),
    st.sampled_from(["date", "date-time", "time", "uuid", "ipv4", "email"]).map(
        lambda f: {"type": "string", "format": f}
    ),
    st.lists(st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=4)), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.one_of(st.integers(), st.text(max_size=5), st.just({"x": [1, None]})).map(lambda value: {"const": value}),
)


def objects(inner):
    return st.builds(
        lambda properties, chosen, more: {
            "type": "object",
            "properties": properties,
            "required": [name for name, is_required in zip(properties, chosen, strict=False) if is_required],
            "additionalProperties": more,
        },
        st.dictionaries(NAMES, inner, max_size=4),
        st.lists(st.booleans(), min_size=4, max_size=4),
        st.one_of(st.just(False), inner),
    )


def arrays(inner):
    return st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )


def tuples(inner):
    return st.builds(
        lambda first, items: {"type": "array", "prefixItems": first, "items": items, "minItems": 1},
        st.lists(inner, min_size=1, max_size=3),
        inner,
    )


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        arrays(inner),
        tuples(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda several: {"anyOf": several}),
        inner.map(lambda s: {"$defs": {"d": s}, "type": "array", "items": {"$ref": "#/$defs/d"}, "maxItems": 3}),
    ),
    max_leaves=8,
)


@QUIET
@given(schema=SCHEMAS, seed=st.integers(0, 5))
def test_any_schema_that_is_taken_gives_answers_that_validate(compiler, answer, schema, seed):
    grammar = json_schema(_with_own_definitions(schema))
    try:
        compiler.check(grammar)
    except InvalidRequest:
        return  # refused, and so not broken
    said = answer(grammar, seed)
    if said.is_whole:
        Draft202012Validator(json.loads(grammar.text)).validate(json.loads(said.text))


def _with_own_definitions(schema):
    """`$ref` starts at the root, wherever hypothesis put the definition."""
    definitions = {}

    def walk(node):
        if isinstance(node, list):
            return [walk(each) for each in node]
        if not isinstance(node, dict) or "const" in node or "enum" in node:
            return node
        node = {key: walk(value) for key, value in node.items()}
        if "d" in (own := node.pop("$defs", {})):
            name = f"d{len(definitions)}"
            definitions[name] = own["d"]
            node["items"] = {"$ref": f"#/$defs/{name}"}
        return node

    walked = walk(schema)
    return walked | {"$defs": definitions} if definitions else walked


CORPUS = [
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "patternProperties": {"^s_[a-z]+$": {"type": "null"}},
        "additionalProperties": False,
    },
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False},
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
            {"properties": {"b": {"type": "integer"}}, "required": ["b"]},
        ]
    },
    {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "integer"}]},
    {"type": "object", "required": ["kind"], "properties": {"kind": {"const": 'a\nb\t"c"\\'}, "a": True}},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["x", 1.5, None]}], "items": False, "minItems": 2},
    {"type": "string", "format": "date-time"},
    {"type": "number", "minimum": -0.5, "maximum": 0.25},
]


@pytest.mark.parametrize("schema", CORPUS, ids=lambda s: json.dumps(s)[:50])
def test_schemas_of_every_kind_give_answers_that_validate(compiler, answer, schema):
    grammar, num_whole = json_schema(schema), 0
    compiler.check(grammar)
    for seed in range(12):
        said = answer(grammar, seed)
        if said.is_whole:
            Draft202012Validator(schema).validate(json.loads(said.text))
            num_whole += 1
    assert num_whole


def test_a_json_object_is_always_an_object(answer):
    whole = [json.loads(said.text) for seed in range(12) if (said := answer(Grammar("json_object"), seed)).is_whole]
    assert whole
    assert all(isinstance(each, dict) for each in whole)


def test_white_space_is_at_most_one_space_after_a_comma_or_colon(answer):
    nulls = {"a": {"type": "null"}, "b": {"type": "null"}}
    schema = {"type": "array", "items": {"type": "object", "properties": nulls, "additionalProperties": False}}
    for seed in range(10):
        text = answer(json_schema(schema), seed).text
        assert not re.search(r"[\t\r\n]|  |[^,:] |^ ", text)


@pytest.mark.parametrize(
    "pattern", ["[a-c]{3}x?", "^ab+$", "([0-9]{2}-){2}[0-9]", "日本|中国", "a/b", r"\\\"x\"", "ß.*é"]
)
def test_an_answer_matches_all_of_a_regex(compiler, answer, pattern):
    compiler.check(Grammar("regex", pattern))
    for seed in range(6):
        said = answer(Grammar("regex", pattern), seed)
        assert not said.is_whole or re.fullmatch(pattern, said.text)


@QUIET
@given(
    choices=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), min_size=1, max_size=5),
    seed=st.integers(0, 3),
)
def test_an_answer_is_one_of_its_choices_whatever_they_are(answer, choices, seed):
    said = answer(Grammar("choice", json.dumps(choices)), seed)
    assert said.is_whole
    assert said.text in choices


def test_a_choice_may_begin_with_another_choice(answer):
    assert {answer(Grammar("choice", '["a", "ab", "abc"]'), seed).text for seed in range(40)} == {"a", "ab", "abc"}


@pytest.mark.parametrize(
    ("lark", "text"),
    [
        ('start: "a" // %json and "%json', "a"),
        ('# %json {"not": {}}\nstart: "a"', "a"),
        ('start: "%json x"', "%json x"),
        ('start: "\\"%json"', '"%json'),
        ("start: /%json [{]/", "%json {"),
        (r"start: /\/%json/", "/%json"),
        ('start: /a"/ %json {"const": "%json"} "b"', 'a""%json"b'),
    ],
)
def test_a_directive_in_a_comment_or_a_text_is_none(answer, lark, text):
    assert answer(Grammar("lark", lark), 0).text == text


def test_json_behind_a_text_is_held_to_the_limits(compiler):
    for lark in (
        'start: "a" %json {"not": {}}',
        'start: /"/ %json {"not": {}} "x"',
        'start: "#" %json {"not": {}}',
        'start: b\nunused: <\x1c/> "x"\nb: %json {"not": {}}\nz: "//"',
    ):
        with pytest.raises(InvalidRequest, match="`not`"):
            compiler.check(Grammar("lark", lark))


def test_a_lark_grammar_binds_and_so_does_json_inside_it(answer):
    lark = 'start: WORD "=" %json {"type": "array", "items": {"type": "boolean"}, "minItems": 2}\nWORD: /[a-z]{2}/'
    for seed in range(8):
        said = answer(Grammar("lark", lark), seed)
        if said.is_whole:
            word, value = said.text.split("=")
            assert re.fullmatch("[a-z]{2}", word)
            assert len(json.loads(value)) >= 2
            assert "  " not in value
            assert "\n" not in value


@pytest.mark.parametrize(
    ("grammar", "name"),
    [
        (Grammar("json_schema", "{"), "JSON"),
        (Grammar("json_schema", '{"not": {}}'), "`not`"),
        (Grammar("json_schema", '{"type": "strin"}'), "strin"),
        (Grammar("json_schema", '{"$ref": "#/$defs/none"}'), "none"),
        (Grammar("json_schema", '{"pattern": "(?=a)b", "type": "string"}'), "look-ahead"),
        (Grammar("json_schema", "false"), "[Uu]nsatisfiable"),
        (Grammar("json_schema", '{"$ref": "#"}'), "compiled"),
        (Grammar("json_schema", '{"oneOf": [{"minimum": 2}, {"maximum": 5}]}'), "`oneOf`"),
        (Grammar("regex", "(a"), "regex"),
        (Grammar("regex", "a" * 2049), "2048"),
        (Grammar("choice", "[]"), "at least one"),
        (Grammar("choice", '["a", 3]'), "string"),
        (Grammar("choice", '{"a": 1}'), "string"),
        (Grammar("choice", json.dumps(["a"] * 2001)), "2000"),
        (Grammar("choice", '["\\ud800"]'), "surrogate"),
        (Grammar("lark", "start: nothing"), "nothing"),
        (Grammar("lark", 'start: %json {"not": {}}'), "`not`"),
        (Grammar("lark", "start: %json {'a': 1}"), "%json"),
        (Grammar("lark", "start: %json " + "[" * 50000), "%json"),
        (Grammar("lark", "#" * 70000), "65536"),
        (Grammar("tools", "{}"), "tool grammar"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused_with_its_reason(compiler, grammar, name):
    with pytest.raises(InvalidRequest, match=name):
        compiler.check(grammar)


def test_a_grammar_in_gbnf_is_told_which_notation_is_read(compiler):
    with pytest.raises(InvalidRequest, match=r'notation, such as `start: "yes" \| "no"`, not in GBNF\.$'):
        compiler.check(Grammar("lark", 'root ::= "yes" | "no"'))
    with pytest.raises(InvalidRequest) as caught:
        compiler.check(Grammar("lark", "start: nothing"))
    assert "GBNF" not in str(caught.value)
    compiler.check(Grammar("lark", 'start: "::="'))
    with pytest.raises(InvalidRequest) as refused:
        compiler.check(Grammar("lark", 'start: "::=" missing'))
    assert "GBNF" not in str(refused.value)


def test_a_prepared_grammar_is_shared_but_each_answer_stands_alone(compiler, vocabulary):
    grammar = Grammar("choice", '["ab", "cd"]')
    assert compiler.cached(Grammar("choice", '["never", "asked"]')) is None
    first = compiler.matcher(grammar)
    first.advance(vocabulary.encode("ab")[0])
    second = compiler.cached(grammar)
    second.advance(vocabulary.encode("cd")[0])
    assert not first.error
    assert not second.error


def test_the_cache_is_bounded_in_bytes_and_forgets_the_least_recent(vocabulary):
    compiler = GrammarCompiler(Vocabulary(vocabulary.tokens, vocabulary.control_ids), max_cache_bytes=3 * 65 * 1024)
    grammars = [Grammar("regex", f"a{n}") for n in range(4)]
    for grammar in grammars[:3]:
        compiler.matcher(grammar)
    compiler.matcher(grammars[0])
    compiler.matcher(grammars[3])
    assert [compiler.cached(grammar) is not None for grammar in grammars] == [True, False, True, True]


def test_a_control_token_is_never_text(answer, vocabulary):
    for seed in range(10):
        ids = answer(Grammar("regex", "(?s:.){20}"), seed).ids
        assert not vocabulary.control_ids & set(ids)


def test_the_essentials_keep_ids_and_refuse_what_the_whole_refuses(vocabulary):
    small = vocabulary.essentials()
    assert small.size == vocabulary.size
    assert all(t == vocabulary.tokens[i] or t == b"" for i, t in enumerate(small.tokens))
    assert (
        small.encode_bytes("aé")
        == [i for b in "aé".encode() for i, t in enumerate(small.tokens) if t == bytes([b])][-3:]
    )
    GrammarCompiler(small).check(Grammar("json_object"))


def test_a_mask_has_room_for_every_id_and_the_end():
    for size in (1, 31, 32, 33, 100291):
        bytes_per_mask = Vocabulary([b"a"] * size).bytes_per_mask
        assert bytes_per_mask % 4 == 0
        assert bytes_per_mask * 8 >= size + 1 > (bytes_per_mask - 4) * 8


@pytest.mark.parametrize("framed", [False, True])
def test_what_is_wrong_is_told_without_what_the_client_did_not_write(vocabulary, framed):
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "a(?=b)"}}}
    grammar = Grammar("json_schema", json.dumps(schema))
    if framed:
        grammar = tool_grammar([{"type": "function", "function": {"name": "f", "parameters": schema}}], Framing())
    with pytest.raises(InvalidRequest) as raised:
        GrammarCompiler(vocabulary).check(grammar)
    assert "look-around" in raised.value.message
    assert "tool_0" not in raised.value.message
    assert "at 5(" not in raised.value.message
