import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from ernie_serve.api.app import create_app
from ernie_serve.api.response_file import ResponseFile
from ernie_serve.api.response_store import Kept
from ernie_serve.billing.free import FreeMeter
from ernie_serve.errors import StartupError


def kept(name: str, size: int = 0) -> Kept:
    return Kept({"id": name}, [{"sent": name}], [{"text": "x" * size}])


@pytest.fixture
def now() -> list[float]:
    return [1e9]


@pytest.fixture
def opened(tmp_path: Path, now: list[float]) -> Any:
    """Open the same file again and again, as servers that follow each other do."""

    @contextmanager
    def open_file(**limits: Any) -> Iterator[ResponseFile]:
        chosen = {"max_responses": 3, "max_bytes": 1000, "keep_seconds": 10, "clock": lambda: now[0], **limits}
        with closing(ResponseFile(tmp_path / "responses.sqlite", **chosen)) as file:
            yield file

    return open_file


def names(file: ResponseFile, *wanted: str) -> list[str]:
    return [name for name in wanted if file.get(b"me", name)]


def test_responses_outlive_the_server(opened: Any) -> None:
    with opened() as file:
        file.put(b"me", kept("a", 5))
        assert file.get(b"me", "a") == kept("a", 5)
    with opened() as file:
        assert file.get(b"me", "a") == kept("a", 5)
        assert file.delete(b"me", "a")
        assert not file.delete(b"me", "a")
    with opened() as file:
        assert file.get(b"me", "a") is None


def test_oldest_makes_room(opened: Any) -> None:
    with opened() as file:
        for name in "abcd":
            file.put(b"me", kept(name))
    with opened() as file:
        assert names(file, *"abcd") == ["b", "c", "d"]


def test_bytes_are_bounded(opened: Any) -> None:
    with opened() as file:
        file.put(b"me", kept("a", 300))
        file.put(b"me", kept("b", 300))
        file.put(b"me", kept("c", 500))
        file.put(b"me", kept("d", 2000))
    with opened() as file:
        assert names(file, *"abcd") == ["b", "c"]


def test_time_is_bounded_over_a_restart(opened: Any, now: list[float], tmp_path: Path) -> None:
    with opened() as file:
        file.put(b"me", kept("a"))
        now[0] += 9
        file.put(b"me", kept("b"))
        assert names(file, "a", "b") == ["a", "b"]
    with opened() as file:
        now[0] += 1
        assert names(file, "a", "b") == ["b"]
        assert not file.delete(b"me", "a")
        file.put(b"me", kept("c"))
    with closing(sqlite3.connect(tmp_path / "responses.sqlite")) as raw:
        assert raw.execute("SELECT id FROM kept").fetchall() == [("b",), ("c",)]


def test_each_owner_sees_its_own(opened: Any) -> None:
    with opened() as file:
        file.put(b"me", kept("a"))
    with opened() as file:
        assert file.get(b"other", "a") is None
        assert not file.delete(b"other", "a")
        assert file.get(b"me", "a")


def test_deleted_text_is_gone_from_the_file(opened: Any, tmp_path: Path) -> None:
    with opened() as file:
        file.put(b"me", kept("a", 500))
    assert any(b"x" * 500 in part.read_bytes() for part in tmp_path.iterdir())
    with opened():  # the log of a file that is in use stays
        with opened() as file:
            file.put(b"me", kept("b", 400))
            assert file.delete(b"me", "a")
            assert file.delete(b"me", "b")
        assert not any(b"x" * 400 in part.read_bytes() for part in tmp_path.iterdir())


def test_what_the_disk_does_not_take_is_bounded(opened: Any, caplog: pytest.LogCaptureFixture) -> None:
    with opened(max_waiting_bytes=400) as file:
        file.put(b"me", kept("a", 500))
        assert file.get(b"me", "a") is None
    assert "does not keep up" in caplog.text


def test_the_file_is_for_its_owner_alone(opened: Any, tmp_path: Path) -> None:
    with opened() as file:
        file.put(b"me", kept("a"))
        for part in tmp_path.iterdir():
            assert stat.S_IMODE(part.stat().st_mode) == 0o600


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    text, store = tmp_path / "notes.txt", tmp_path / "billing.sqlite"
    text.write_text("These are notes, and no database at all. " * 50)
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("CREATE TABLE accounts (id TEXT)")
        connection.commit()
    with pytest.raises(StartupError, match="cannot be used"):
        ResponseFile(text)
    with pytest.raises(StartupError, match="another program's database"):
        ResponseFile(store)
    with pytest.raises(StartupError, match="cannot be used"):
        ResponseFile(tmp_path / "none" / "responses.sqlite")
    with closing(sqlite3.connect(store)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("accounts",)]


def test_many_threads_each_get_back_what_they_kept(opened: Any) -> None:
    with opened(max_responses=1000, max_bytes=1 << 20) as file:
        failures: list[str] = []

        def work(number: int) -> None:
            owner = b"%d" % number
            for turn in range(30):
                name = f"{number}-{turn}"
                file.put(owner, kept(name, turn))
                if file.get(owner, name) != kept(name, turn):
                    failures.append(name)
                if turn % 3 == 0 and not file.delete(owner, name):
                    failures.append(f"delete {name}")

        threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
    with opened(max_responses=1000, max_bytes=1 << 20) as file:
        for number in range(8):
            left = [turn for turn in range(30) if file.get(b"%d" % number, f"{number}-{turn}")]
            assert left == [turn for turn in range(30) if turn % 3]


def test_two_servers_share_a_file(opened: Any) -> None:
    with opened() as first:
        first.put(b"me", kept("a"))
    with opened() as first, opened() as second:
        assert first.delete(b"me", "a")
        first.put(b"me", kept("b"))
        second.put(b"me", kept("c"))
    with opened() as file:
        assert names(file, *"abc") == ["b", "c"]


def test_a_conversation_goes_on_after_a_restart(
    opened: Any, make_services: Callable[..., Any], engine: Any, ask_app: Any
) -> None:
    limits = {"max_bytes": 1 << 20}

    def respond(file: ResponseFile, key: str, **fields: Any) -> httpx.Response:
        app = create_app(make_services(responses=file, meter=FreeMeter(("one", "two"))))
        headers = {"authorization": f"Bearer {key}"}
        return ask_app(app, "POST", "/v1/responses", json={"model": "ernie", **fields}, headers=headers)

    with opened(**limits) as file:
        first = respond(file, "one", input="Hi").json()
        unstored = respond(file, "one", input="Hi", store=False).json()
    with opened(**limits) as file:
        again = respond(file, "one", input="More", previous_response_id=first["id"])
        assert again.status_code == 200
        prompt = bytes(engine.requests[-1].prompt_token_ids).decode()
        assert prompt == "user: Hi\nassistant: Hello, world!\nuser: More\nassistant: "
        assert respond(file, "two", input="More", previous_response_id=first["id"]).status_code == 400
        assert respond(file, "one", input="More", previous_response_id=unstored["id"]).status_code == 400
        app = create_app(make_services(responses=file, meter=FreeMeter(("one", "two"))))
        path, mine = f"/v1/responses/{first['id']}", {"authorization": "Bearer one"}
        assert ask_app(app, "GET", path, headers=mine).json() == first
        assert ask_app(app, "GET", path, headers={"authorization": "Bearer two"}).status_code == 404
        assert ask_app(app, "DELETE", path, headers=mine).json()["deleted"]
        assert ask_app(app, "GET", path, headers=mine).status_code == 404
