import asyncio
from typing import Any

import pytest

from ernie_serve.api.connection import ClientLeft, while_connected


async def stays() -> Any:
    """The client waits for its answer."""
    await asyncio.Event().wait()


def test_result_of_work_comes_back() -> None:
    async def work() -> int:
        return 7

    assert asyncio.run(while_connected(stays, work())) == 7


def test_failure_of_work_comes_back() -> None:
    async def work() -> int:
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(while_connected(stays, work()))


def test_departure_cancels_work_and_waits_for_its_end() -> None:
    ended: list[str] = []

    async def leaves() -> Any:
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("yes")

    with pytest.raises(ClientLeft):
        asyncio.run(while_connected(leaves, work()))
    assert ended == ["yes"]


def test_more_of_the_body_is_no_departure() -> None:
    messages = iter([{"type": "http.request"}] * 3 + [{"type": "http.disconnect"}])
    left = asyncio.Event()

    async def receive() -> Any:
        message = next(messages)
        if message["type"] == "http.disconnect":
            left.set()
        return message

    with pytest.raises(ClientLeft):
        asyncio.run(while_connected(receive, stays()))
    assert left.is_set()


def test_cancelling_the_waiter_cancels_the_work() -> None:
    async def scenario() -> bool:
        cancelled = asyncio.Event()
        begun = asyncio.Event()

        async def work() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        waiter = asyncio.ensure_future(while_connected(stays, work()))
        await begun.wait()
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        return cancelled.is_set()

    assert asyncio.run(scenario())
