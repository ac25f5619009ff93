"""The official SDK's helpers against a running server: parsing, tools, streams and responses, sync and async."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.lib.responses_tool_runner import RegisteredFunction, ResponsesToolRunner
from pydantic import BaseModel

from ernie_serve.api.app import create_app

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
THOUGHT = "I think.\n</think>\n\n"
CALL = '\n<tool_call>\n{"name": "Weather", "arguments": {"city": "北京"}}\n</tool_call>\n'


class Weather(BaseModel):
    """The weather of a city."""

    city: str


class Point(BaseModel):
    """A place."""

    x: int
    y: int


@pytest.fixture
def url(serve: Any, thinking_services: Any) -> str:
    return str(serve(create_app(thinking_services))) + "/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=20) as client:
        yield client


def test_answer_is_parsed_into_a_model(client: openai.OpenAI, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + '{"x": 1, "y": 2}')
    answer = client.chat.completions.parse(model="ernie", messages=MESSAGES, response_format=Point)
    assert answer.choices[0].message.parsed == Point(x=1, y=2)
    assert json.loads(engine.requests[0].sampling.grammar.text)["required"] == ["x", "y"]


def test_calls_are_parsed_into_models(client: openai.OpenAI, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + CALL)
    tools: Any = [openai.pydantic_function_tool(Weather)]
    answer = client.chat.completions.parse(model="ernie", messages=MESSAGES, tools=tools)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="北京")


def test_calls_are_told_by_the_stream_helper(client: openai.OpenAI, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + CALL + CALL)
    tools: Any = [openai.pydantic_function_tool(Weather)]
    with client.chat.completions.stream(model="ernie", messages=MESSAGES, tools=tools) as stream:
        events = list(stream)
        answer = stream.get_final_completion()
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [Weather(city="北京")] * 2
    calls = answer.choices[0].message.tool_calls or []
    assert len({call.id for call in calls}) == 2
    assert answer.choices[0].finish_reason == "tool_calls"


def test_call_and_result_make_a_round(client: openai.OpenAI, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + CALL)
    tools: Any = [openai.pydantic_function_tool(Weather)]
    first = client.chat.completions.create(model="ernie", messages=MESSAGES, tools=tools).choices[0].message
    assert first.tool_calls
    engine.reply = tagged(THOUGHT + "It rains.")
    messages = [
        *MESSAGES,
        first.to_dict(),
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "rain"},
    ]
    second = client.chat.completions.create(model="ernie", messages=messages, tools=tools)
    assert second.choices[0].message.content == "It rains."


def test_response_is_made_retrieved_and_deleted(client: openai.OpenAI, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + "Answer.")
    made = client.responses.create(model="ernie", input="Hi")
    assert made.output_text == "Answer."
    assert made.usage
    assert made.usage.output_tokens_details.reasoning_tokens == 10
    assert client.responses.retrieve(made.id) == made
    (item,) = client.responses.input_items.list(made.id).data
    assert item.type == "message"
    counted = client.responses.input_tokens.count(model="ernie", input="Hi")
    assert counted.input_tokens == made.usage.input_tokens
    next_ = client.responses.create(model="ernie", input="And?", previous_response_id=made.id)
    assert next_.previous_response_id == made.id
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError) as gone:
        client.responses.create(model="ernie", input="And?", previous_response_id=made.id)
    assert gone.value.code == "previous_response_not_found"


def test_response_is_streamed(client: openai.OpenAI, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + "Answer.")
    events = list(client.responses.create(model="ernie", input="Hi", stream=True))
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Answer."
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "I think."


def test_response_by_the_stream_helper_is_parsed(client: openai.OpenAI, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + '{"x": 1, "y": 2}')
    with client.responses.stream(model="ernie", input="Hi", text_format=Point) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == Point(x=1, y=2)
    assert client.responses.parse(model="ernie", input="Hi", text_format=Point).output_parsed == Point(x=1, y=2)


def test_calls_of_a_response_are_parsed(client: openai.OpenAI, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + CALL)
    tools: Any = [openai.pydantic_function_tool(Weather)["function"] | {"type": "function"}]
    with client.responses.stream(model="ernie", input="Hi", tools=tools) as stream:
        kinds = [event.type for event in stream]
        call = stream.get_final_response().output[-1]
    assert "response.function_call_arguments.delta" in kinds
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "北京"}


@pytest.mark.parametrize("stream", [False, True])
def test_tool_runner_goes_round_until_there_is_an_answer(
    client: openai.OpenAI, engine: Any, tagged: Any, stream: bool
) -> None:
    asked: list[Any] = []

    def weather(arguments: dict[str, object]) -> str:
        asked.append(arguments)
        engine.reply = tagged(THOUGHT + "It rains.")
        return "rain"

    tool: Any = {
        "type": "function",
        "name": "Weather",
        "parameters": Weather.model_json_schema(),
        "strict": False,
    }
    engine.reply = tagged(THOUGHT + CALL)
    runner = ResponsesToolRunner(functions=[RegisteredFunction(tool, weather)])
    answer: Any = runner.run(client, {"model": "ernie", "input": "Weather?"}, stream=stream)
    assert asked == [{"city": "北京"}]
    assert answer.output_text == "It rains."


def test_async_client_does_the_same(url: str, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + '{"x": 1, "y": 2}')

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=20) as client:
            parsed = await client.chat.completions.parse(model="ernie", messages=MESSAGES, response_format=Point)
            assert parsed.choices[0].message.parsed == Point(x=1, y=2)
            async with client.chat.completions.stream(model="ernie", messages=MESSAGES) as stream:
                text = "".join([event.delta async for event in stream if event.type == "content.delta"])
            assert json.loads(text) == {"x": 1, "y": 2}
            made = await client.responses.create(model="ernie", input="Hi")
            assert json.loads(made.output_text) == {"x": 1, "y": 2}
            async with client.responses.stream(model="ernie", input="Hi", text_format=Point) as events:
                assert (await events.get_final_response()).output_parsed == Point(x=1, y=2)
            await client.responses.delete(made.id)

    asyncio.run(ask())


@pytest.mark.parametrize("step", [1, 7])
def test_sixty_four_streams_at_once_each_get_their_own(url: str, engine: Any, tagged: Any, step: int) -> None:
    engine.step = step
    frame = "user: prompt {}\n\n"
    engine.replies = {frame.format(n).encode(): tagged(f"thought {n}\n</think>\nanswer {n} 🎉") for n in range(64)}

    async def ask(client: openai.AsyncOpenAI, number: int) -> tuple[str, str]:
        thought = text = ""
        if number % 2:
            messages: Any = [{"role": "user", "content": f"prompt {number}"}]
            async for chunk in await client.chat.completions.create(model="ernie", messages=messages, stream=True):
                text += chunk.choices[0].delta.content or ""
                thought += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
            return thought, text
        async for event in await client.responses.create(model="ernie", input=f"prompt {number}", stream=True):
            if event.type == "response.output_text.delta":
                text += event.delta
            elif event.type == "response.reasoning_text.delta":
                thought += event.delta
        return thought, text

    async def ask_all() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(64)))

    assert asyncio.run(ask_all()) == [(f"thought {n}", f"answer {n} 🎉") for n in range(64)]
    assert engine.left == []
