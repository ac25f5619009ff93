"""The official SDK, unchanged, against a running server."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from ernie_serve.api.app import create_app
from ernie_serve.billing.free import FreeMeter

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def url(serve: Any, services: Any) -> str:
    return str(serve(create_app(services))) + "/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=20) as client:
        yield client


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="ernie", prompt="Hi", logprobs=1, seed=1, stop=["world"])
    assert answer.choices[0].text == "Hello, "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs
    assert answer.usage
    assert answer.usage.prompt_tokens == 2


def test_completions_streamed(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="ernie", prompt=["a", "b"], n=2, stream=True))
    texts = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == index) for index in range(4)]
    assert texts == ["Hello, world!"] * 4


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="ernie", messages=MESSAGES, max_completion_tokens=5, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs
    assert answer.choices[0].logprobs.content
    assert answer.choices[0].logprobs.content[0].bytes == [72]
    assert answer._request_id


def test_chat_streamed_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="ernie", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello, world!"
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 14
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_by_the_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="ernie", messages=MESSAGES) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        answer = stream.get_final_completion()
    assert "".join(deltas) == answer.choices[0].message.content == "Hello, world!"


def test_extras_of_open_servers(client: openai.OpenAI, engine: Any) -> None:
    client.chat.completions.create(
        model="ernie",
        messages=MESSAGES,
        extra_body={"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 3, "priority": 2},
    )
    sampling = engine.requests[0].sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.min_tokens) == (7, 0.1, 1.2, 3)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["baidu/ernie", "ernie"]
    assert client.models.retrieve("baidu/ernie").id == "baidu/ernie"


def test_errors_are_the_sdks_own(client: openai.OpenAI, engine: Any) -> None:
    create = client.completions.create
    with pytest.raises(openai.NotFoundError) as not_found:
        create(model="gpt-4", prompt="a")
    assert (not_found.value.code, not_found.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        create(model="ernie", prompt="a", temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        create(model="ernie", prompt="a" * 300)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="ernie", input="a")
    engine.break_after = 0
    with pytest.raises(openai.InternalServerError):
        create(model="ernie", prompt="a")
    engine.state = "loading"
    with pytest.raises(openai.InternalServerError) as loading:
        create(model="ernie", prompt="a")
    assert loading.value.status_code == 503


def test_body_that_is_too_large_is_answered_while_it_is_sent(client: openai.OpenAI) -> None:
    for _ in range(2):
        with pytest.raises(openai.APIStatusError) as raised:
            client.completions.create(model="ernie", prompt="a" * 9_000_000)
        assert raised.value.status_code == 413
    assert client.completions.create(model="ernie", prompt="a").choices[0].text == "Hello, world!"


def test_error_in_the_middle_of_a_stream_is_raised(client: openai.OpenAI, engine: Any) -> None:
    engine.break_after = 5
    chunks = client.completions.create(model="ernie", prompt="a", stream=True)
    assert "".join(next(chunks).choices[0].text for _ in range(5)) == "Hello"
    with pytest.raises(openai.APIError, match="It broke"):
        next(chunks)


def test_keys(serve: Any, make_services: Any) -> None:
    url = str(serve(create_app(make_services(meter=FreeMeter(("sk-right",)))))) + "/v1"
    with (
        openai.OpenAI(base_url=url, api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    with openai.OpenAI(base_url=url, api_key="sk-right", max_retries=0) as client:
        assert client.models.list().data


def test_sixty_four_at_once_each_get_their_own_text(url: str, engine: Any) -> None:
    engine.replies = {f"prompt {number}".encode(): f"answer {number} 🎉" for number in range(64)}

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        if number % 2:
            answer = await client.completions.create(model="ernie", prompt=f"prompt {number}", max_tokens=50)
            return answer.choices[0].text
        chunks = await client.completions.create(model="ernie", prompt=f"prompt {number}", max_tokens=50, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=30) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(64)))

    assert asyncio.run(ask_all()) == [f"answer {number} 🎉" for number in range(64)]
    assert len({request.request_id for request in engine.requests}) == 64
    assert engine.left == []
