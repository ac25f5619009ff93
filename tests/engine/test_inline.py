import asyncio
from contextlib import aclosing

import pytest
from engine_fakes import make_core, make_info, make_request, plain_loop

from ernie_serve.engine.inline import InlineClient
from ernie_serve.errors import EngineUnavailable


def inline(core):
    return InlineClient(core, make_info(core))


async def tokens_of(client, request) -> list[int]:
    return [token async for output in client.generate(request) for token in output.token_ids]


def test_many_requests_at_once_get_the_text_of_the_plain_loop():
    async def scenario():
        client = inline(make_core())
        requests = [make_request(f"r{n}", [n, 1, 2], max_tokens=10) for n in range(20)]
        texts = await asyncio.gather(*[tokens_of(client, request) for request in requests])
        assert texts == [plain_loop(request, 200)[0] for request in requests]
        await client.close()

    asyncio.run(scenario())


def test_it_is_ready_at_once_and_describes_its_engine():
    async def scenario():
        client = inline(make_core(num_blocks=9, block_size=4))
        assert client.state == "ready"
        assert (client.info.num_blocks, client.info.block_size) == (9, 4)
        await client.close()
        assert client.state == "closed"

    asyncio.run(scenario())


def test_a_cancelled_reader_gives_its_blocks_back():
    async def scenario():
        core = make_core(num_blocks=1000, max_model_len=4000)
        client = inline(core)
        started = asyncio.Event()

        async def read():
            async with aclosing(client.generate(make_request("r", [1], max_tokens=3000))) as outputs:
                async for _ in outputs:
                    started.set()

        reader = asyncio.ensure_future(read())
        await started.wait()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await client.close()
        core.scheduler.pool.check()
        assert not core.scheduler.has_work

    asyncio.run(scenario())


def test_a_failing_step_is_an_error_output_and_a_second_one_ends_the_engine():
    async def scenario():
        core = make_core()
        core.runner.failures = [RuntimeError("two"), RuntimeError("one")]
        client = inline(core)
        outputs = [output async for output in client.generate(make_request("a", [1]))]
        assert [output.finish_reason for output in outputs] == ["error"]
        with pytest.raises(EngineUnavailable, match="two"):
            await tokens_of(client, make_request("b", [1]))
        assert client.state == "failed"
        await client.close()

    asyncio.run(scenario())
