import asyncio

import pytest

from ernie_serve.api.replays import Replays
from ernie_serve.errors import RequestConflict


def get(replays: Replays, request_id: str) -> bytes:
    return asyncio.run(replays.get(request_id))


def test_what_is_about_to_be_kept_is_waited_for() -> None:
    async def scenario(body: bytes | None) -> bytes:
        replays = Replays()
        replays.expect("a")
        asked = asyncio.create_task(replays.get("a"))
        await asyncio.sleep(0)
        assert not asked.done()
        replays.put("a", body)
        return await asked

    assert asyncio.run(scenario(b"body")) == b"body"
    with pytest.raises(RequestConflict):
        asyncio.run(scenario(None))


def test_what_was_kept_is_had_again() -> None:
    replays = Replays()
    replays.put("a", b"body")
    assert get(replays, "a") == get(replays, "a") == b"body"
    with pytest.raises(RequestConflict, match="not kept"):
        get(replays, "b")


def test_the_oldest_make_room() -> None:
    replays = Replays(max_bytes=10)
    for name in "abc":
        replays.put(name, b"1234")
    with pytest.raises(RequestConflict):
        get(replays, "a")
    assert (get(replays, "b"), get(replays, "c")) == (b"1234", b"1234")
    replays.put("large", b"x" * 11)
    with pytest.raises(RequestConflict):
        get(replays, "large")
    assert get(replays, "c") == b"1234"


def test_nothing_is_kept_for_longer_than_its_time() -> None:
    now = 0.0
    replays = Replays(keep_seconds=5, clock=lambda: now)
    replays.put("a", b"body")
    now = 4.9
    assert get(replays, "a") == b"body"
    now = 5.0
    with pytest.raises(RequestConflict):
        get(replays, "a")
