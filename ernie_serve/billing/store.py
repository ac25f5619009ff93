"""Runs small pieces of SQL off the event loop, many in one transaction.

Knows threads, transactions and which failures mean that the database is away. Knows no table and no money.

Work is handed in with a lane, the account it touches. A thread takes everything that waits in one lane and commits it
together; SQLite has a single lane and a single thread, PostgreSQL one lane for each account and a few threads. So a
busy store waits for the disk once for many requests, and a transaction never locks two accounts.
"""

import asyncio
import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DatabaseError, DataError, IntegrityError, InterfaceError, ProgrammingError, TimeoutError

from ernie_serve.billing.database import Database, cause_of
from ernie_serve.errors import StoreUnavailable

T = TypeVar("T")

_log = logging.getLogger(__name__)
_MAX_TOGETHER = 256
_AWAY = (DatabaseError, InterfaceError, TimeoutError, sqlite3.Error)
_OURS = (IntegrityError, DataError, ProgrammingError)


class Store:
    """The writers and readers of one database.

    `write` returns when its work is committed; raises `StoreUnavailable` when the database cannot be reached, written
    or waited for, in which case the work may or may not have been done: what is written here can be written twice.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.embedded = database.embedded
        self._waiting: dict[str, list[_Work]] = {}
        self._ready: deque[str] = deque()
        self._busy: set[str] = set()
        self._change = threading.Condition()
        self._closed = False
        self.num_commits = 0
        self._readers = ThreadPoolExecutor(database.num_readers, thread_name_prefix="billing-reader")
        self._writers = [
            threading.Thread(target=self._serve, name=f"billing-writer-{index}", daemon=True)
            for index in range(database.num_writers)
        ]
        for writer in self._writers:
            writer.start()

    async def write(self, do: Callable[[Connection], T], *, lane: str = "", durable: bool = True) -> T:
        """Run `do` in a transaction and return what it returned once that is committed.

        Cancelling the caller does not cancel the work.
        """
        return await self.written(do, lane=lane, durable=durable)

    def written(self, do: Callable[[Connection], T], *, lane: str = "", durable: bool = True) -> "asyncio.Future[T]":
        """Like `write`, for callers in an event loop who do not wait at once; the work is handed in already."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        try:
            self._take(_Work(do, durable, result, loop), lane)
        except StoreUnavailable as error:
            result.set_exception(error)
        return result

    async def read(self, do: Callable[[Connection], T]) -> T:
        """Run `do` on a reader's connection, beside the writers."""
        return await asyncio.wrap_future(self._readers.submit(self._read, do))

    def submit(self, do: Callable[[Connection], T], *, lane: str = "", durable: bool = True) -> "Future[T]":
        """Like `write`, for callers without an event loop."""
        result: Future[T] = Future()
        result.set_running_or_notify_cancel()
        self._take(_Work(do, durable, result), lane)
        return result

    def close(self) -> None:
        """Finish what was handed in, then let go of the database."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for writer in self._writers:
            writer.join()
        self._readers.shutdown()
        self._database.close()

    def _take(self, work: "_Work", lane: str) -> None:
        lane = "" if self.embedded else lane
        with self._change:
            if self._closed:
                raise StoreUnavailable("The billing store is closed: the server is shutting down.")
            self._waiting.setdefault(lane, []).append(work)
            if lane not in self._busy and lane not in self._ready:
                self._ready.append(lane)
                self._change.notify()

    def _read(self, do: Callable[[Connection], T]) -> T:
        try:
            with self._database.reader.connect() as connection, connection.begin():
                return do(connection)
        except _AWAY as error:
            raise _unavailable(error) from error

    def _serve(self) -> None:
        """What each writer's thread does until the store is closed and nothing waits."""
        while True:
            with self._change:
                self._change.wait_for(lambda: self._ready or (self._closed and not self._waiting))
                if not self._ready:
                    return
                lane = self._ready.popleft()
                self._busy.add(lane)
                waiting = self._waiting.pop(lane)
                works, later = waiting[:_MAX_TOGETHER], waiting[_MAX_TOGETHER:]
                if later:
                    self._waiting[lane] = later
            self._run(lane, works)
            with self._change:
                self._busy.discard(lane)
                if lane in self._waiting:
                    self._ready.append(lane)
                self._change.notify_all()

    def _run(self, lane: str, works: "list[_Work]") -> None:
        """Commit works together; where one of them is at fault, each by itself."""
        try:
            with self._database.transaction(durable=any(work.durable for work in works), lane=lane) as connection:
                answers = [work.do(connection) for work in works]
        except Exception as error:
            if len(works) > 1 and not is_away(error):
                for work in works:
                    self._run(lane, [work])
                return
            _tell([(work, None, _unavailable(error)) for work in works])
            return
        self.num_commits += 1
        _tell([(work, answer, None) for work, answer in zip(works, answers, strict=True)])


@dataclass(frozen=True, slots=True)
class _Work:
    """Something to do in a transaction, and where its answer goes: a future of `loop`, or one of any thread."""

    do: Callable[[Connection], Any]
    durable: bool
    result: "Future[Any] | asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop | None = None


_Outcome = tuple[_Work, Any, Exception | None]


def _tell(outcomes: list[_Outcome]) -> None:
    """Give what a group became to those who wait; an event loop is woken once for all of them."""
    loops: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
    for outcome in outcomes:
        if (loop := outcome[0].loop) is None:
            _give([outcome])
        else:
            loops.setdefault(loop, []).append(outcome)
    for loop, theirs in loops.items():
        with suppress(RuntimeError):  # a closed loop has nobody who waits
            loop.call_soon_threadsafe(_give, theirs)


def _give(outcomes: list[_Outcome]) -> None:
    for work, answer, error in outcomes:
        if work.result.cancelled():
            continue  # whoever waited has left
        if error is None:
            work.result.set_result(answer)
        else:
            work.result.set_exception(error)


def is_away(error: Exception) -> bool:
    """Whether the database failed, rather than what was asked of it."""
    return isinstance(error, _AWAY) and not isinstance(error, _OURS)


def _unavailable(error: Exception) -> Exception:
    if not is_away(error):
        return error
    _log.error("The billing store failed: %s", cause_of(error))
    return StoreUnavailable(
        "The billing store cannot be used at the moment, so nothing was generated. Try again shortly.",
        retry_after_seconds=5,
    )
