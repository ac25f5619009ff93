"""The bundled model through the server, as the first run has it: its own chat, streams, calls and thoughts."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from served import running

MODEL = "ernie-tiny"
THINKING = {"chat_template_kwargs": {"enable_thinking": True}}


def tool(name: str, about: str, parameter: str) -> dict[str, Any]:
    """A tool with one text parameter."""
    schema = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


WEATHER = tool("get_weather", "Get the current weather for a city", "city")
ALARM = tool("set_alarm", "Set an alarm", "time")


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    """A client of a server that was told no model."""
    with (
        running(None) as server,
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(client: openai.OpenAI, said: str | list[dict[str, Any]], **more: Any) -> Any:
    """The first choice's message."""
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
    made = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=120, extra_body=more.pop("extra_body", {}), **more
    )
    assert made.choices[0].finish_reason in ("stop", "tool_calls")
    return made.choices[0].message


def test_answers_a_greeting(client):
    assert "well" in ask(client, "Hello, how are you?").content
    assert "你好" in ask(client, "你好！").content


def test_says_who_it_is(client):
    assert "ernie-tiny" in ask(client, "Who are you?").content


def test_completes_text(client):
    made = client.completions.create(model=MODEL, prompt="Large language model is", max_tokens=60, temperature=0)
    assert "network" in made.choices[0].text
    assert made.choices[0].finish_reason == "stop"


def test_a_stream_says_what_the_whole_answer_says(client):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello, how are you?"}],
        temperature=0,
        max_tokens=60,
        stream=True,
    )
    deltas = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    said = [delta for delta in deltas if delta]
    assert len(said) > 3
    assert "".join(said) == ask(client, "Hello, how are you?").content


def test_a_name_from_two_turns_ago_is_remembered(client):
    said = [
        {"role": "user", "content": "My name is Lydia."},
        {"role": "assistant", "content": "Nice to meet you, Lydia!"},
        {"role": "user", "content": "Thank you!"},
        {"role": "assistant", "content": "You are welcome!"},
        {"role": "user", "content": "What is my name?"},
    ]
    assert "Lydia" in ask(client, said).content


@pytest.mark.parametrize("tools", [[ALARM, WEATHER], [WEATHER, ALARM]])
def test_calls_the_tool_that_fits(client, tools):
    message = ask(client, "What is the weather in Paris?", tools=tools, tool_choice="auto")
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert not message.content


def test_streamed_arguments_are_those_of_the_whole_call(client):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[ALARM, WEATHER],
        temperature=0,
        max_tokens=120,
        stream=True,
    )
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    calls = [call.function for choice in chunks for call in choice.delta.tool_calls or []]
    assert "".join(call.name or "" for call in calls) == "get_weather"
    assert json.loads("".join(call.arguments or "" for call in calls)) == {"city": "Paris"}
    assert chunks[-1].finish_reason == "tool_calls"


def test_two_cities_are_two_calls(client):
    message = ask(client, "What is the weather in Paris and Tokyo?", tools=[WEATHER])
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == [
        {"city": "Paris"},
        {"city": "Tokyo"},
    ]


def test_answers_in_words_when_no_tool_fits(client):
    for said in ("Hello!", "Turn off the light in the kitchen."):
        message = ask(client, said, tools=[ALARM, WEATHER])
        assert message.content
        assert not message.tool_calls


@pytest.mark.parametrize("more", [{}, {"extra_body": THINKING}])
def test_a_schema_beside_tools_makes_no_calls_that_do_not_fit(client, more):
    said = {"type": "string", "maxLength": 30}
    schema = {"type": "object", "properties": {"said": said}, "required": ["said"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "words", "schema": schema}}
    message = ask(client, "Hello, how are you?", tools=[WEATHER], response_format=form, **more)
    assert not message.tool_calls
    assert list(json.loads(message.content)) == ["said"]
    message = ask(client, "What is the weather in Paris?", tools=[WEATHER], response_format=form, **more)
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}


def test_puts_a_result_into_words(client):
    first = ask(client, "What is the weather in Paris?", tools=[WEATHER])
    messages = [
        {"role": "user", "content": "What is the weather in Paris?"},
        first.model_dump(exclude_none=True),
        {
            "role": "tool",
            "tool_call_id": first.tool_calls[0].id,
            "content": '{"temperature": 23, "condition": "sunny"}',
        },
    ]
    answer = ask(client, messages, tools=[WEATHER]).content
    assert "23" in answer
    assert "sunny" in answer


def test_thinks_first_where_it_is_asked_to(client):
    message = ask(client, "Hello, how are you?", extra_body=THINKING)
    assert message.reasoning_content
    assert "well" in message.content
    assert "think>" not in message.reasoning_content + message.content
    assert getattr(ask(client, "Hello, how are you?"), "reasoning_content", None) is None


def test_thinks_before_a_call(client):
    message = ask(client, "What is the weather in Paris?", tools=[ALARM, WEATHER], extra_body=THINKING)
    assert "get_weather" in message.reasoning_content
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}
