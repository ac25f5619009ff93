"""A tool grammar permits calls and nothing else; among text, nothing that looks like a call and is none."""

import json
import re

import pytest
from jsonschema import Draft202012Validator

from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar.tools import Framing, read, tool_grammar
from ernie_serve.messages import Grammar

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "北京"]}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
SCHEMAS = {"get": CITY, "get_more": {"properties": {"x": {"type": "boolean"}}, "required": ["x"]}, "now": None}
TOOLS = [
    {"type": "function", "function": {"name": name} | ({} if schema is None else {"parameters": schema})}
    for name, schema in SCHEMAS.items()
]
CALL = re.compile(r'<tool_call>\n(\{"name": .*?\}\})\n</tool_call>', re.DOTALL)


@pytest.fixture(params=["control tokens", "plain text"])
def framing(request, tokenizer):
    if request.param == "plain text":
        return Framing()
    return Framing(begin_id=tokenizer.token_id("<tool_call>"), end_id=tokenizer.token_id("</tool_call>"))


def check_call(text, schemas=SCHEMAS):
    call = json.loads(text)
    assert list(call) == ["name", "arguments"]
    assert isinstance(call["arguments"], dict)
    Draft202012Validator(schemas[call["name"]] or {}).validate(call["arguments"])
    return call["name"]


def test_required_calls_are_all_there_is_and_satisfy_their_schemas(compiler, answer, framing):
    grammar, called, num_calls = tool_grammar(TOOLS, framing), set(), set()
    compiler.check(grammar)
    for seed in range(40):
        said = answer(grammar, seed)
        if said.is_whole:
            calls = CALL.findall(said.text)
            called |= {check_call(call) for call in calls}
            num_calls.add(len(calls))
            assert CALL.sub("", said.text).strip("\n") == ""
    assert called == set(SCHEMAS)
    assert {1, 2} <= num_calls


def test_control_tokens_frame_a_call_as_tokens(answer, tokenizer):
    begin, end = tokenizer.token_id("<tool_call>"), tokenizer.token_id("</tool_call>")
    said = answer(tool_grammar(TOOLS[:1], Framing(begin_id=begin, end_id=end), parallel=False), 3)
    assert said.is_whole
    assert [i for i in said.ids if i in tokenizer.control_ids] == [begin, end]


def test_only_one_call_where_they_may_not_be_parallel(answer, framing):
    grammar = tool_grammar(TOOLS[:1], framing, parallel=False)
    for seed in range(8):
        said = answer(grammar, seed)
        assert said.is_whole
        assert len(CALL.findall(said.text)) == 1
        assert said.text.endswith("</tool_call>\n")


def test_only_the_named_tools_are_called(answer, framing):
    grammar = tool_grammar(TOOLS, framing, names=["get"])
    for seed in range(8):
        assert set(re.findall(r'"name": "(\w+)"', answer(grammar, seed, max_tokens=200).text)) == {"get"}


def test_among_text_whatever_begins_like_a_call_is_one(compiler, answer, framing, tokenizer):
    """The free text is made likely to begin calls: every answer is extended by hand from where it may begin one."""
    strict = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]
    grammar = tool_grammar(strict, framing, mode="auto")
    compiler.check(grammar)
    matcher = compiler.matcher(grammar)
    begin = tokenizer.encode("Hm.<tool_call>", parse_special=framing.begin_id is not None)
    for token_id in begin:
        matcher.advance(token_id)
    assert not matcher.error
    lost = compiler.matcher(grammar)
    for token_id in [*begin, *tokenizer.encode("\nnot a call")]:
        lost.advance(token_id)
    assert lost.error
    text = '\n{"name": "get", "arguments": {"city": "Oslo"}}\n'
    end = tokenizer.encode(text + "</tool_call>", parse_special=framing.begin_id is not None)
    for token_id in [*end, *tokenizer.encode(" And more.")]:
        matcher.advance(token_id)
    assert not matcher.error
    assert not matcher.has_ended


def test_among_text_chance_says_nothing_but_whole_calls(answer, framing):
    grammar = tool_grammar(TOOLS, framing, mode="auto")
    for seed in range(10):
        said = answer(grammar, seed, max_tokens=150, haste=0.02)
        if said.is_whole:
            rest = CALL.sub("", said.text)
            assert "<tool_call>" not in rest


def test_among_text_control_tokens_are_free_and_one_call_may_be_all(compiler, tokenizer, framing):
    grammar = tool_grammar(TOOLS, framing, mode="auto", parallel=False)
    matcher, parse = compiler.matcher(grammar), framing.begin_id is not None
    text = "<response>hi</response>" if parse else "hi"
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for token_id in tokenizer.encode(text + call + "\nDone.", parse_special=parse):
        matcher.advance(token_id)
    assert not matcher.error
    for token_id in tokenizer.encode("<tool_call>", parse_special=parse):
        matcher.advance(token_id)
    assert matcher.error


@pytest.mark.parametrize("is_token", [False, True])
def test_among_text_no_hidden_token_parts_the_letters_of_a_tag(compiler, tokenizer, is_token):
    hidden, seen = tokenizer.token_id("<s>"), tokenizer.token_id("<response>")
    begin_id, end_id = (tokenizer.token_id(tag) if is_token else None for tag in ("<tool_call>", "</tool_call>"))
    framing = Framing(begin_id=begin_id, end_id=end_id, seen_ids=(seen,))
    grammar = tool_grammar(TOOLS, framing, mode="auto")

    def allows(*pieces):
        ids = [i for piece in pieces for i in (tokenizer.encode(piece) if isinstance(piece, str) else [piece])]
        return compiler.matcher(grammar)._matcher.validate_tokens(ids) == len(ids)

    tag = "<tool_call>"
    for at in range(1, len(tag)):
        assert not allows("Hm. " + tag[:at], hidden, tag[at:])
        assert not allows(hidden, tag[:at], hidden)
        assert allows("Hm. " + tag[:at], seen, tag[at:])
        assert allows("Hm. " + tag[:at] + "!", hidden, hidden, tag[at:], hidden)
    assert allows(hidden, "if a <b: <tool>", hidden, seen, hidden)


def test_among_text_only_strict_tools_are_held_to_their_schemas(compiler):
    loose = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
    compiler.check(tool_grammar([loose], Framing(), mode="auto"))
    loose["function"]["strict"] = True
    with pytest.raises(InvalidRequest, match="`not`"):
        tool_grammar([loose], Framing(), mode="auto")


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"type": "string"}, "object"),
        ({"type": ["object", "null"]}, "object"),
        ({"properties": {"a": {"uniqueItems": True}}}, "uniqueItems"),
        ([1], "JSON schema"),
    ],
)
def test_parameters_that_cannot_be_promised_are_refused_with_the_name_of_the_tool(parameters, name):
    with pytest.raises(InvalidRequest, match=name) as caught:
        tool_grammar([{"type": "function", "function": {"name": "my_tool", "parameters": parameters}}], Framing())
    assert "my_tool" in caught.value.message
    assert caught.value.param == "tools"


def test_a_tool_that_is_not_there_cannot_be_chosen():
    with pytest.raises(InvalidRequest, match="nothing"):
        tool_grammar(TOOLS, Framing(), names=["get", "nothing"])
    with pytest.raises(InvalidRequest, match="no tool"):
        tool_grammar([], Framing())


def test_what_is_read_back_is_held_to_the_limits_again():
    grammar = tool_grammar(TOOLS[:1], Framing())
    assert read(grammar.text).tools[0].arguments == CITY
    with pytest.raises(InvalidRequest, match="contains"):
        read(grammar.text.replace('"properties"', '"contains"'))


def test_many_tools_with_like_names_compile(compiler, answer):
    tools = [{"type": "function", "function": {"name": "t" * (n + 1), "parameters": CITY}} for n in range(60)]
    grammar = tool_grammar(tools, Framing())
    compiler.check(grammar)
    schemas = {tool["function"]["name"]: CITY for tool in tools}
    for seed in range(3):
        for call in CALL.findall(answer(grammar, seed).text):
            check_call(call, schemas)


def test_the_grammar_is_plain_data():
    assert isinstance(tool_grammar(TOOLS, Framing()), Grammar)


@pytest.mark.parametrize("parameters", [{}, {"parameters": None}])
def test_a_tool_without_parameters_takes_none(parameters, answer):
    tool = {"type": "function", "function": {"name": "now", **parameters}}
    for seed in range(5):
        said = answer(tool_grammar([tool], Framing(), parallel=False), seed)
        assert '"arguments": {}' in said.text
