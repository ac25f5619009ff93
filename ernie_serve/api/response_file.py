"""Responses kept in an SQLite file of their own, so that they outlive the server.

Knows one table and the thread that alone writes it. Knows nothing of how responses are made, and no other store: a file
that is not its own is refused. Nobody waits for the disk: what is still to be written is answered from memory.
"""

import logging
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread

import orjson

from ernie_serve.api.response_store import Kept
from ernie_serve.errors import StartupError

logger = logging.getLogger(__name__)

APPLICATION_ID = 0x45525350
"""What SQLite's header says of our files."""

DAY_SECONDS = 24 * 3600.0

_TABLE = """
CREATE TABLE IF NOT EXISTS kept (
    place INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner BLOB NOT NULL,
    expires_seconds REAL NOT NULL,
    num_bytes INTEGER NOT NULL,
    json BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS kept_bytes ON kept (num_bytes);
CREATE INDEX IF NOT EXISTS kept_expiry ON kept (expires_seconds);
"""


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """A response to write, or without `json` one to delete."""

    response_id: str
    owner: bytes
    expires_seconds: float
    json: bytes | None


class ResponseFile:
    """At most so many bytes and responses; the oldest make room. Safe for threads, and for several servers at once.

    Responses expire after `keep_seconds`, by default OpenAI's thirty days. `clock` gives seconds that go on over a
    restart. What the disk has not taken is bounded as well: beyond `max_waiting_bytes` new responses are not kept.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_responses: int = 100_000,
        max_bytes: int = 1 << 30,
        keep_seconds: float = 30 * DAY_SECONDS,
        max_waiting_bytes: int = 64 << 20,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the file, or make it. Raises `StartupError` if it cannot be written or is something else."""
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._keep_seconds = keep_seconds
        self._max_waiting_bytes = max_waiting_bytes
        self._clock = clock
        self._lock = Lock()
        self._waiting: dict[str, _Change] = {}
        self._num_waiting_bytes = 0
        self._changes: SimpleQueue[_Change | None] = SimpleQueue()
        self._reader = _opened(path)
        self._writer = Thread(target=self._write_all, args=[path], name="responses-file", daemon=True)
        self._writer.start()

    def put(self, owner: bytes, kept: Kept) -> None:
        """Keep a response under its id. One that is larger than all the room is not kept."""
        json = orjson.dumps([kept.body, kept.input_items, kept.conversation])
        if len(json) > self._max_bytes:
            return
        with self._lock:
            if self._num_waiting_bytes + len(json) > self._max_waiting_bytes:
                logger.warning("A response was not kept: the disk does not keep up with --responses-file")
                return
            self._change(_Change(kept.body["id"], owner, self._clock() + self._keep_seconds, json))

    def get(self, owner: bytes, response_id: str) -> Kept | None:
        """The response, if it is kept and this owner's."""
        with self._lock:
            json = self._find(owner, response_id)
        return Kept(*orjson.loads(json)) if json is not None else None

    def delete(self, owner: bytes, response_id: str) -> bool:
        """Forget the response, if it is kept and this owner's; whether it was."""
        with self._lock:
            if self._find(owner, response_id) is None:
                return False
            self._change(_Change(response_id, owner, 0.0, None))
            return True

    def close(self) -> None:
        """Write what is still to be written."""
        self._changes.put(None)
        self._writer.join()
        self._reader.close()

    def _find(self, owner: bytes, response_id: str) -> bytes | None:
        now = self._clock()
        if (change := self._waiting.get(response_id)) is not None:
            return change.json if change.owner == owner and change.expires_seconds > now else None
        wanted = "SELECT json FROM kept WHERE id = ? AND owner = ? AND expires_seconds > ?"
        try:
            row = self._reader.execute(wanted, (response_id, owner, now)).fetchone()
        except sqlite3.Error as error:
            _log_failure("read", error)
            return None
        return row[0] if row else None

    def _change(self, change: _Change) -> None:
        self._forget_waiting(self._waiting.get(change.response_id))
        self._waiting[change.response_id] = change
        self._num_waiting_bytes += len(change.json or b"")
        self._changes.put(change)

    def _forget_waiting(self, change: _Change | None) -> None:
        if change is not None and self._waiting.get(change.response_id) is change:
            del self._waiting[change.response_id]
            self._num_waiting_bytes -= len(change.json or b"")

    def _write_all(self, path: Path) -> None:
        """The writer's whole life: what has come in together is written together."""
        with closing(_connected(path)) as connection:
            going_on = True
            while going_on:
                batch = [self._changes.get()]
                while not self._changes.empty() and len(batch) < 256:
                    batch.append(self._changes.get())
                going_on = None not in batch
                changes = [change for change in batch if change is not None]
                try:
                    with connection:
                        self._write(connection, changes)
                    if any(change.json is None for change in changes):  # the log still holds what was deleted
                        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                except sqlite3.Error as error:
                    _log_failure("written", error)
                with self._lock:
                    for change in changes:
                        self._forget_waiting(change)

    def _write(self, connection: sqlite3.Connection, changes: list[_Change]) -> None:
        for change in changes:
            connection.execute("DELETE FROM kept WHERE id = ?", (change.response_id,))
            if change.json is not None:
                row = (change.response_id, change.owner, change.expires_seconds, len(change.json), change.json)
                connection.execute(
                    "INSERT INTO kept (id, owner, expires_seconds, num_bytes, json) VALUES (?, ?, ?, ?, ?)", row
                )
        connection.execute("DELETE FROM kept WHERE expires_seconds <= ?", (self._clock(),))
        count, size = connection.execute("SELECT count(*), coalesce(sum(num_bytes), 0) FROM kept").fetchone()
        while count > self._max_responses or size > self._max_bytes:
            place, num_bytes = connection.execute("SELECT place, num_bytes FROM kept ORDER BY place LIMIT 1").fetchone()
            connection.execute("DELETE FROM kept WHERE place = ?", (place,))
            count, size = count - 1, size - num_bytes


def _opened(path: Path) -> sqlite3.Connection:
    """A connection to a file that is ours, made for its owner's eyes if it was not there."""
    try:
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        connection = _connected(path)
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application != APPLICATION_ID and num_tables:
            connection.close()
            raise StartupError(f"{path} is another program's database. Give --responses-file a file of its own.")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_TABLE)
    except (OSError, sqlite3.Error) as error:
        raise StartupError(f"--responses-file {path} cannot be used: {error}.") from None
    return connection


def _connected(path: Path) -> sqlite3.Connection:
    """A connection whose users see to it themselves that they are not two at once."""
    connection = sqlite3.connect(path, timeout=10, check_same_thread=False)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA secure_delete = ON")
    return connection


def _log_failure(what: str, error: sqlite3.Error) -> None:
    """Say what kind of failure it was; its values may be a client's."""
    logger.error("Kept responses could not be %s: %s", what, getattr(error, "sqlite_errorname", type(error).__name__))
