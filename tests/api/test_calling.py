"""Reasoning, calls of functions and structured output, from the request to the engine and back."""

import json
from typing import Any

import pytest

from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar.tools import read
from ernie_serve.messages import Grammar

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>\n'
SECOND = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>\n'
THOUGHT = "I think.\n</think>\n\n"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def message(response: Any) -> Any:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]


def fold(events: list[Any]) -> dict[str, Any]:
    """What the chunks of one choice add up to."""
    told: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": [], "finish_reason": None}
    for chunk in events[:-1]:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            told["content"] += delta.get("content") or ""
            told["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(told["tool_calls"])
                    told["tool_calls"].append({"id": call["id"], "type": call["type"], "function": call["function"]})
                else:
                    told["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            told["finish_reason"] = choice["finish_reason"] or told["finish_reason"]
    return told


@pytest.mark.parametrize("step", [1, 3, 200])
def test_reasoning_stands_beside_the_answer(think: Any, engine: Any, tagged: Any, read_events: Any, step: int) -> None:
    engine.reply, engine.step = tagged(THOUGHT + "<response>\nAnswer.\n</response>\n"), step
    response = think()
    assert message(response) == {
        "role": "assistant",
        "content": "Answer.",
        "refusal": None,
        "reasoning_content": "I think.",
    }
    usage = response.json()["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len("I think.\n") + 1}
    assert usage["completion_tokens"] > 10
    streamed = fold(read_events(think(stream=True).text))
    assert (streamed["content"], streamed["reasoning_content"]) == ("Answer.", "I think.")
    assert streamed["finish_reason"] == "stop"


@pytest.mark.parametrize("step", [1, 4, 500])
def test_calls_are_told_whole_and_in_a_stream(
    think: Any, engine: Any, tagged: Any, read_events: Any, step: int
) -> None:
    engine.reply, engine.step = tagged(THOUGHT + "\n" + CALL + "\n" + SECOND), step
    response = think(tools=[WEATHER, TIME])
    told = message(response)
    assert told["content"] is None
    assert told["reasoning_content"] == "I think."
    assert [call["function"]["name"] for call in told["tool_calls"]] == ["get_weather", "get_time"]
    assert json.loads(told["tool_calls"][0]["function"]["arguments"]) == {"city": "北京"}
    assert response.json()["choices"][0]["finish_reason"] == "tool_calls"
    assert len({call["id"] for call in told["tool_calls"]}) == 2
    streamed = fold(read_events(think(stream=True, tools=[WEATHER, TIME]).text))
    assert [call["function"] for call in streamed["tool_calls"]] == [call["function"] for call in told["tool_calls"]]
    assert streamed["finish_reason"] == "tool_calls"


def test_call_that_is_cut_off_says_so(think: Any, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + "\n" + CALL)
    length = len(tagged(THOUGHT + '\n<tool_call>\n{"name": "get_weather", "arguments": {"ci'))
    choice = think(tools=[WEATHER], max_tokens=length).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"ci'


def test_one_call_is_enough_where_calls_are_not_parallel(think: Any, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + "\n" + CALL + "\n" + SECOND)
    told = message(think(tools=[WEATHER, TIME], parallel_tool_calls=False))
    assert len(told["tool_calls"]) == 1
    assert engine.left, "the rest is not made"


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ["get_weather", "get_time"]),
        ({"type": "function", "function": {"name": "get_time"}}, ["get_time"]),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}},
            ["get_weather"],
        ),
    ],
)
def test_calls_that_are_required_are_bound_by_a_grammar(think: Any, engine: Any, choice: Any, names: list[str]) -> None:
    think(tools=[WEATHER, TIME], tool_choice=choice)
    sampling = engine.requests[0].sampling
    grammar = json.loads(sampling.grammar.text)
    assert sampling.grammar.kind == "tools"
    assert [tool["name"] for tool in grammar["tools"]] == names
    assert grammar["free_text"] is False
    assert sampling.grammar_after_token_id == 258


def test_calls_that_are_free_are_still_well_formed(think: Any, engine: Any) -> None:
    think(tools=[WEATHER, TIME])
    grammar = json.loads(engine.requests[0].sampling.grammar.text)
    assert grammar["free_text"] is True
    assert {tool["name"]: tool["arguments"] for tool in grammar["tools"]}["get_time"] == {"type": "object"}


def test_no_tools_no_grammar(think: Any, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + CALL)
    told = message(think(tools=[WEATHER], tool_choice="none"))
    assert "tool_calls" not in told
    assert "get_weather" in told["content"]
    assert engine.requests[0].sampling.grammar is None
    assert b"tools:" not in bytes(i for i in engine.requests[0].prompt_token_ids if i < 256)


def test_tools_are_told_to_every_checkpoint(think: Any, chat: Any, call_with: Any, engine: Any) -> None:
    think(tools=[WEATHER])
    messages = [{"role": "user", "content": "Hi"}]
    call_with(max_model_len=4096)(
        "POST", "/v1/chat/completions", json={"model": "ernie", "messages": messages, "tools": [WEATHER]}
    )
    for request in engine.requests:
        assert b"get_weather" in bytes(i for i in request.prompt_token_ids if i < 256)


def test_checkpoint_without_a_form_of_its_own_calls_too(call_with: Any, engine: Any) -> None:
    engine.reply = "Let me see.\n" + CALL
    body = {"model": "ernie", "messages": [{"role": "user", "content": "Hi"}], "tools": [WEATHER]}
    told = message(call_with(max_model_len=4096)("POST", "/v1/chat/completions", json=body))
    assert told["content"] == "Let me see."
    assert told["tool_calls"][0]["function"]["name"] == "get_weather"


def test_history_of_calls_reaches_the_template(think: Any, engine: Any) -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "x"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
    ]
    assert think(messages=messages, tools=[WEATHER]).status_code == 200
    prompt = bytes(i for i in engine.requests[0].prompt_token_ids if i < 256).decode()
    assert 'call: {"name": "get_weather"' in prompt
    assert "tool: rain" in prompt


FORMATS = [
    (
        {"response_format": {"type": "json_object", "schema": {"type": "object", "required": ["a"]}}},
        "json_schema",
        '{"type": "object", "required": ["a"]}',
    ),
    ({"response_format": {"type": "json_object"}}, "json_object", ""),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
        "json_schema",
        json.dumps(SCHEMA),
    ),
    ({"structured_outputs": {"json": SCHEMA}}, "json_schema", json.dumps(SCHEMA)),
    ({"structured_outputs": {"json": "{}"}}, "json_schema", "{}"),
    ({"structured_outputs": {"json_object": True}}, "json_object", ""),
    ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
    ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a", "b"]'),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
]


@pytest.mark.parametrize(("fields", "kind", "text"), FORMATS)
def test_formats_become_grammars(
    think: Any, chat: Any, complete: Any, engine: Any, fields: Any, kind: str, text: str
) -> None:
    for ask, after in ((complete, None), (chat, None), (think, 258)):
        assert ask(**fields).status_code == 200
        sampling = engine.requests[-1].sampling
        assert (sampling.grammar.kind, sampling.grammar.text) == (kind, text)
        assert sampling.grammar_after_token_id == after


def test_format_and_tools_go_together(think: Any, engine: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    think(response_format=form, tools=[WEATHER])
    assert read(engine.requests[0].sampling.grammar.text).otherwise == Grammar("json_schema", json.dumps(SCHEMA))
    think(response_format=form, tools=[WEATHER], tool_choice="none")
    assert engine.requests[1].sampling.grammar.kind == "json_schema"
    think(response_format=form, tools=[WEATHER], tool_choice="required")
    assert read(engine.requests[2].sampling.grammar.text).otherwise is None


@pytest.mark.parametrize("choice", ["\n\nfoo", "foo \n", "<response>\nfoo\n</response>", "</think>"])
def test_choice_comes_back_as_the_client_spelled_it(
    think: Any, engine: Any, tagged: Any, read_events: Any, choice: str
) -> None:
    engine.reply = [*tagged("Hm.\n</think>"), *choice.encode()]
    form = {"structured_outputs": {"choice": [choice]}}
    assert message(think(**form))["content"] == choice
    assert fold(read_events(think(**form, stream=True).text))["content"] == choice
    engine.reply = [*tagged("Hm.\n</think>\n\n<response>\n"), *choice.encode(), *tagged("\n</response>\n")]
    assert message(think(**form, tools=[WEATHER]))["content"] == choice
    assert fold(read_events(think(**form, tools=[WEATHER], stream=True).text))["content"] == choice


def test_form_beside_tools_is_framed_as_words_are(think: Any, engine: Any, tagged: Any) -> None:
    """A model that begins its words with `<response>` could begin nothing but a call without it."""
    engine.reply = tagged('Hm.\n</think>\n\n<response>\n{"a": 1}\n</response>\n')
    assert message(think(response_format={"type": "json_object"}, tools=[WEATHER]))["content"] == '{"a": 1}'
    words = read(engine.requests[-1].sampling.grammar.text).words
    assert (words.begin_id, words.end_id) == (259, 260)


def test_text_is_any_text(chat: Any, engine: Any) -> None:
    chat(response_format={"type": "text"})
    assert engine.requests[0].sampling.grammar is None


def test_grammar_that_cannot_be_compiled_is_told_by_the_field_it_comes_from(call_with: Any, engine: Any) -> None:
    def refuse(grammar: Any) -> None:
        raise InvalidRequest("It is too hard.")

    call = call_with(check_grammar=refuse, max_model_len=4096)
    body = {"model": "ernie", "messages": [{"role": "user", "content": "Hi"}]}
    assert call("POST", "/v1/chat/completions", json=body).status_code == 200
    for field, value, more in (
        ("response_format", {"type": "json_object"}, {}),
        ("structured_outputs", {"regex": "("}, {}),
        ("structured_outputs", {"regex": "("}, {"tools": [WEATHER]}),
        ("tools", [WEATHER], {}),
        ("tools", [WEATHER], {"tool_choice": "required", "response_format": {"type": "json_object"}}),
    ):
        response = call("POST", "/v1/chat/completions", json={**body, **more, field: value, "stream": True})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == field
    response = call(
        "POST", "/v1/responses", json={"model": "ernie", "input": "Hi", "text": {"format": {"type": "json_object"}}}
    )
    assert response.json()["error"]["param"] == "text.format"
    assert len(engine.requests) == 1


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": {}}, "tools"),
    ({"tools": [WEATHER] * 2}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]}, "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "a", "strict": 1}}]}, "tools[0].function.strict"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes", "tools": [TIME]}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [TIME]}, "tool_choice"),
    ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}, "tools": [TIME]}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}, "tools": [TIME]}, "tool_choice"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}},
        "response_format.json_schema.schema",
    ),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"thinking": [1]}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": 1}, "chat_template_kwargs"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"max_reasoning_tokens": -1}, "max_reasoning_tokens"),
    ({"max_reasoning_tokens": 1, "thinking_token_budget": 0}, "thinking_token_budget"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[f"{n}-{param}" for n, (_, param) in enumerate(WRONG)])
def test_what_is_wrong_is_named(think: Any, fields: dict[str, Any], param: str) -> None:
    response = think(**fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({}, None),
        ({"max_reasoning_tokens": 5}, 5),
        ({"thinking_token_budget": 0}, 0),
        ({"thinking_token_budget": 5, "max_reasoning_tokens": 5}, 5),
        ({"reasoning_effort": "low"}, 1024),
        ({"reasoning_effort": "high"}, None),
        ({"reasoning_effort": "none"}, 0),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 0),
        ({"chat_template_kwargs": {"thinking": True}}, None),
        ({"reasoning_effort": "low", "max_reasoning_tokens": 7}, 7),
    ],
)
def test_reasoning_has_the_room_it_is_given(
    think: Any, engine: Any, fields: dict[str, Any], budget: int | None
) -> None:
    think(**fields)
    sampling = engine.requests[0].sampling
    assert sampling.max_reasoning_tokens == budget
    assert sampling.reasoning_end_token_id == (None if budget is None else 258)
    assert (258 in sampling.reasoning_end_forced_ids) == (budget is not None)


def test_logprobs_are_those_of_the_answer(think: Any, engine: Any, tagged: Any) -> None:
    engine.reply = tagged("Hm.\n</think>\nYes")
    logprobs = think(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in logprobs) == "\nYes"
