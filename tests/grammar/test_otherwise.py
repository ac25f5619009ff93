"""Calls or a text of a form: compiled here, so that a text can be tried against it token by token."""

import json
from typing import Any

import pytest

from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar.compiler import GrammarCompiler, Vocabulary
from ernie_serve.grammar.tools import Framing, tool_grammar
from ernie_serve.messages import Grammar

STRICT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "parameters": STRICT, "strict": True}},
    {"type": "function", "function": {"name": "g"}},
    {"type": "function", "function": {"name": "h"}},
]
FORM = Grammar("json_schema", json.dumps({"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}))
FRAMING = Framing()
TAGS = {256: "<tool_call>", 257: "</tool_call>", 258: "<response>", 259: "</response>"}
COMPILER = GrammarCompiler(
    Vocabulary([*(bytes([byte]) for byte in range(256)), *(tag.encode() for tag in TAGS.values())], frozenset(TAGS))
)


def calls_or(
    form: Grammar, framing: Framing = FRAMING, *, parallel: bool = True, words: Framing | None = None
) -> Grammar:
    return tool_grammar(TOOLS, framing, mode="auto", names=("f", "g"), parallel=parallel, otherwise=form, words=words)


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>\n'


def ids_of(text: str, *, as_tokens: bool) -> list[int]:
    if not as_tokens:
        return list(text.encode())
    ids: list[int] = []
    while text:
        tag = next((token_id for token_id, tag in TAGS.items() if text.startswith(tag)), None)
        ids += [tag] if tag is not None else text[0].encode()
        text = text[len(TAGS[tag]) :] if tag is not None else text[1:]
    return ids


def allows(grammar: Grammar, ids: list[int]) -> bool:
    """Whether the grammar permits all of these tokens and then the end."""
    matcher: Any = COMPILER._compile(grammar)
    return bool(matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting())


ALLOWED = [
    '{"x": 1}',
    call("f", '{"a": 1}'),
    "\n" + call("g", '{"any": []}'),
    call("g", "{}") + "\n" + call("f", '{"a":2}'),
]
REFUSED = ["", "text", '{"x": 3}', call("h", "{}"), call("f", '{"b": 1}'), call("g", "[]"), "text " + call("g", "{}")]


@pytest.mark.parametrize("as_tokens", [False, True])
def test_answer_is_calls_or_of_its_form(as_tokens: bool) -> None:
    grammar = calls_or(FORM, Framing(begin_id=256, end_id=257) if as_tokens else FRAMING)
    COMPILER.check(grammar)
    for text in ALLOWED:
        assert allows(grammar, ids_of(text, as_tokens=as_tokens)), text
    for text in REFUSED:
        assert not allows(grammar, ids_of(text, as_tokens=as_tokens)), text


@pytest.mark.parametrize("as_tokens", [False, True])
def test_form_is_framed_where_words_are(as_tokens: bool) -> None:
    framing = Framing(begin_id=256, end_id=257) if as_tokens else FRAMING
    words = Framing(begin="<response>", end="</response>")
    if as_tokens:
        words = Framing(begin="<response>", end="</response>", begin_id=258, end_id=259)
    grammar = calls_or(FORM, framing, words=words)
    COMPILER.check(grammar)
    framed = '<response>\n{"x": 1}\n</response>\n'
    for text in (framed, "\n\n" + framed, *ALLOWED[1:]):
        assert allows(grammar, ids_of(text, as_tokens=as_tokens)), text
    for text in ('{"x": 1}', framed[:-12], "<response>\ntext\n</response>\n", framed + ALLOWED[2], *REFUSED):
        assert not allows(grammar, ids_of(text, as_tokens=as_tokens)), text


def test_calls_that_are_not_parallel_are_one() -> None:
    grammar = calls_or(FORM, parallel=False)
    assert allows(grammar, list(call("g", "{}").encode()))
    assert not allows(grammar, list((call("g", "{}") + "\n" + call("g", "{}")).encode()))


@pytest.mark.parametrize(
    ("form", "text"), [(Grammar("json_object"), '{"a": "b"}'), (Grammar("choice", '["a/b", "c|d"]'), "c|d")]
)
def test_other_forms_stand_beside_calls_too(form: Grammar, text: str) -> None:
    grammar = calls_or(form)
    assert allows(grammar, list(text.encode()))
    assert allows(grammar, list(call("g", "{}").encode()))


@pytest.mark.parametrize(
    "form",
    [Grammar("json_schema", text) for text in ("{} | /x/", "{", '{"not": {}}')]
    + [Grammar("choice", json.dumps([f"a{index}" for index in range(3000)])), Grammar("choice", "[]")],
)
def test_a_form_is_held_beside_calls_to_what_it_is_held_to_alone(form: Grammar) -> None:
    for grammar in (form, calls_or(form)):
        with pytest.raises(InvalidRequest):
            COMPILER.check(grammar)


@pytest.mark.parametrize("kind", ["regex", "lark"])
def test_forms_that_cannot_stand_beside_calls_are_named(kind: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"kind '{kind}' cannot be kept together"):
        COMPILER.check(calls_or(Grammar(kind, "a")))
