from typing import Any

import pytest

from ernie_serve.api.response_store import Kept, ResponseStore


def kept(name: str, size: int = 0) -> Kept:
    return Kept({"id": name}, [], [{"text": "x" * size}])


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def store(now: list[float]) -> ResponseStore:
    return ResponseStore(max_responses=3, max_bytes=1000, keep_seconds=10, clock=lambda: now[0])


def names(store: ResponseStore, *wanted: str) -> list[Any]:
    return [name for name in wanted if store.get(b"me", name)]


def test_oldest_makes_room(store: ResponseStore) -> None:
    for name in "abcd":
        store.put(b"me", kept(name))
    assert names(store, *"abcd") == ["b", "c", "d"]


def test_bytes_are_bounded(store: ResponseStore) -> None:
    store.put(b"me", kept("a", 300))
    store.put(b"me", kept("b", 300))
    store.put(b"me", kept("c", 600))
    assert names(store, *"abc") == ["b", "c"]
    store.put(b"me", kept("d", 2000))
    assert names(store, *"abcd") == ["b", "c"]


def test_time_is_bounded(store: ResponseStore, now: list[float]) -> None:
    store.put(b"me", kept("a"))
    now[0] = 9
    store.put(b"me", kept("b"))
    assert names(store, "a", "b") == ["a", "b"]
    now[0] = 10
    assert names(store, "a", "b") == ["b"]
    assert not store.delete(b"me", "a")


def test_each_owner_sees_its_own(store: ResponseStore) -> None:
    store.put(b"me", kept("a"))
    assert store.get(b"other", "a") is None
    assert not store.delete(b"other", "a")
    assert store.delete(b"me", "a")
    assert store.get(b"me", "a") is None


def test_room_comes_back(store: ResponseStore) -> None:
    for _ in range(50):
        store.put(b"me", kept("a", 900))
        assert store.delete(b"me", "a")
    store.put(b"me", kept("b", 900))
    assert names(store, "b") == ["b"]
