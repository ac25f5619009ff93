import asyncio

import pytest

from ernie_serve.engine.outputs import OutputQueue
from ernie_serve.messages import EngineOutput, TokenLogprobs


def output(*token_ids: int, **fields) -> EngineOutput:
    logprobs = [TokenLogprobs(token, -1.0, []) for token in token_ids]
    return EngineOutput(request_id="r", token_ids=list(token_ids), logprobs=logprobs, **fields)


def test_what_is_unread_becomes_one_output():
    async def scenario():
        queue = OutputQueue()
        queue.put(output(1, num_cached_tokens=4))
        assert await queue.get() == output(1, num_cached_tokens=4)
        queue.put(output(2, num_cached_tokens=4))
        queue.put(output(3, num_cached_tokens=4))
        queue.put(output(4, num_cached_tokens=4, finish_reason="stop", stop_token_id=4))
        assert await queue.get() == output(2, 3, 4, num_cached_tokens=4, finish_reason="stop", stop_token_id=4)

    asyncio.run(scenario())


def test_an_error_keeps_the_tokens_that_were_unread():
    async def scenario():
        queue = OutputQueue()
        queue.put(output(1, num_cached_tokens=4))
        queue.put(EngineOutput(request_id="r", finish_reason="error"))
        assert await queue.get() == output(1, num_cached_tokens=4, finish_reason="error")

    asyncio.run(scenario())


def test_an_error_keeps_its_code():
    async def scenario():
        queue = OutputQueue()
        queue.put(output(1))
        queue.put(EngineOutput(request_id="r", finish_reason="error", error="None.", error_code="no_token_left"))
        assert await queue.get() == output(1, finish_reason="error", error="None.", error_code="no_token_left")

    asyncio.run(scenario())


def test_when_a_request_began_is_kept_with_what_is_unread():
    async def scenario():
        queue = OutputQueue()
        queue.put(output(1, began_at=5.0))
        queue.put(output(2))
        assert await queue.get() == output(1, 2, began_at=5.0)

    asyncio.run(scenario())


def test_get_waits_for_news():
    async def scenario():
        queue = OutputQueue()
        reader = asyncio.ensure_future(queue.get())
        await asyncio.sleep(0)
        assert not reader.done()
        queue.put(output(1))
        assert await reader == output(1)

    asyncio.run(scenario())


def test_what_was_received_before_a_failure_is_read_first():
    async def scenario():
        queue = OutputQueue()
        queue.put(output(1))
        queue.fail(RuntimeError("gone"))
        assert await queue.get() == output(1)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="gone"):
                await queue.get()

    asyncio.run(scenario())


def test_logprobs_of_the_prompt_add_up_in_order():
    async def scenario():
        queue = OutputQueue()
        scores = [TokenLogprobs(token, -2.0, []) for token in range(5)]
        queue.put(output(prompt_logprobs=scores[:2]))
        queue.put(output(7, prompt_logprobs=scores[2:4]))
        assert await queue.get() == output(7, prompt_logprobs=scores[:4])
        queue.put(output(8, prompt_logprobs=scores[4:]))
        assert (await queue.get()).prompt_logprobs == scores[4:]

    asyncio.run(scenario())
