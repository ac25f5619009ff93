"""Noticing that a client left while work is done for it.

Knows ASGI's `receive`. Knows nothing of what the work is.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientLeft(Exception):
    """The client closed its connection; nobody waits for an answer."""


async def while_connected(
    receive: Receive, work: Coroutine[Any, Any, T], client_left: Callable[[], None] = lambda: None
) -> T:
    """The result of the work, which is cancelled when the client leaves first; `client_left` is told before.

    The request's body has been read before. Raises `ClientLeft`, and whatever the work raises.
    """
    task = asyncio.ensure_future(work)
    departure = asyncio.ensure_future(until_disconnect(receive))
    try:
        await asyncio.wait({task, departure}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            client_left()
            raise ClientLeft
        return task.result()
    finally:
        await cancel_all(task, departure)


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_all(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs and wait for its `finally` blocks; failures of cancelled work are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
