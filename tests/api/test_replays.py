import pytest

from ernie_serve.api.replays import Replays
from ernie_serve.errors import RequestConflict


def test_what_was_kept_is_had_again() -> None:
    replays = Replays()
    replays.put("a", b"body")
    assert replays.get("a") == replays.get("a") == b"body"
    with pytest.raises(RequestConflict, match="not kept"):
        replays.get("b")


def test_the_oldest_make_room() -> None:
    replays = Replays(max_bytes=10)
    for name in "abc":
        replays.put(name, b"1234")
    with pytest.raises(RequestConflict):
        replays.get("a")
    assert (replays.get("b"), replays.get("c")) == (b"1234", b"1234")
    replays.put("large", b"x" * 11)
    with pytest.raises(RequestConflict):
        replays.get("large")
    assert replays.get("c") == b"1234"


def test_nothing_is_kept_for_longer_than_its_time() -> None:
    now = 0.0
    replays = Replays(keep_seconds=5, clock=lambda: now)
    replays.put("a", b"body")
    now = 4.9
    assert replays.get("a") == b"body"
    now = 5.0
    with pytest.raises(RequestConflict):
        replays.get("a")
