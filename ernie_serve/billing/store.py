"""Runs small pieces of SQL off the event loop, many in one transaction.

Knows threads, transactions and which failures mean that the database is away. Knows no table and no money.

Work is handed in with a lane, the account it touches. A thread takes everything that waits in one lane and commits it
together; SQLite has a single lane and a single thread, PostgreSQL one lane for each account and a few threads. So a
busy store waits for the disk once for many requests, and a transaction never locks two accounts.
"""

import asyncio
import logging
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DatabaseError, DataError, IntegrityError, InterfaceError, ProgrammingError, TimeoutError

from ernie_serve.billing.database import COMMIT_SECONDS, COMPUTE_SECONDS, Database, cause_of
from ernie_serve.errors import StoreUnavailable

_MOST_IMPATIENT = 64
"""So many turns of the event loop at most give no way to the writer after one in which it was slow."""

Item = TypeVar("Item")
T = TypeVar("T")

_Identity = tuple[int, int]
"""What tells an open file from any other that comes to lie at its path: device and inode."""

_log = logging.getLogger(__name__)
_MAX_TOGETHER = 256


class _FileGone(Exception):
    """SQLite's file is not at its path: nobody who looks there would find what is written now."""


_AWAY = (DatabaseError, InterfaceError, TimeoutError, sqlite3.Error, _FileGone)
_OURS = (IntegrityError, DataError, ProgrammingError)


class Store:
    """The writers and readers of one database.

    `write` returns when its work is committed; raises `StoreUnavailable` when the database cannot be reached, written
    or waited for, in which case the work may or may not have been done: what is written here can be written twice.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.embedded = database.embedded
        self._files = {} if database.path is None else _files_of(database.path)
        self._waiting: dict[str, list[_Work]] = {}
        self._ready: deque[str] = deque()
        self._busy: set[str] = set()
        self._change = threading.Condition()
        self._computing = False
        self._flushing = False
        self._giving_way: asyncio.AbstractEventLoop | None = None
        self._impatient = 0  # turns still to come that give no way
        self._impatience = 0  # and how many they were after the last slow one
        self._told: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
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
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.hand_in(do, partial(_resolve, result), lane=lane, durable=durable)
        return await result

    def hand_in(self, do: Callable[[Connection], T], then: "Then[T]", *, lane: str = "", durable: bool = True) -> None:
        """Like `write`, for callers in an event loop who do not wait: the loop calls `then` as soon as it hears."""
        loop = asyncio.get_running_loop()
        try:
            self._take(_Work(do, durable, then, loop), lane)
        except StoreUnavailable as error:
            then(None, error)
            return
        if self.embedded and self._giving_way is not loop:
            self._giving_way = loop
            loop.call_soon(self._give_way, loop)

    async def read(self, do: Callable[[Connection], T]) -> T:
        """Run `do` on a reader's connection, beside the writers."""
        return await asyncio.wrap_future(self._readers.submit(self._read, do))

    def submit(self, do: Callable[[Connection], T], *, lane: str = "", durable: bool = True) -> "Future[T]":
        """Like `write`, for callers without an event loop."""
        result: Future[T] = Future()
        result.set_running_or_notify_cancel()
        self._take(_Work(do, durable, partial(_resolve, result)), lane)
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

    def _give_way(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let SQLite's writer compute what was handed in during the last turn of the event loop, before the next.

        Both need the interpreter, and a loop with much to do leaves it only for moments in which no other thread wakes
        up: the writer would get on when the loop is idle again. While the disk is waited for there is one more turn, in
        which those who are charged can prepare what they tell then. What is slow is not waited for: where a group takes
        longer than we wait, the loop goes on, and gives no way in the turn after; in twice as many if it is slow again.
        """
        self._giving_way = None
        if self._impatient:
            self._impatient -= 1
            self._hear(loop)
        elif not self._is_computed():
            self._found(loop, quick=False)
        elif self._flushing:
            loop.call_soon(self._give_way_on, loop)
        else:
            self._give_way_on(loop)

    def _give_way_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let it end what it has computed."""
        with self._change:
            quick = not self._busy or self._computing or self._change.wait(COMMIT_SECONDS)
        self._found(loop, quick=quick)

    def _is_computed(self) -> bool:
        """Wait for the writer to compute for as long as a turn may; whether it has."""
        with self._change:
            while self._ready or self._computing:
                if not self._change.wait(COMPUTE_SECONDS):
                    return False
        return True

    def _found(self, loop: asyncio.AbstractEventLoop, *, quick: bool) -> None:
        """Tell what became of it so far; be as patient as what was found allows."""
        self._impatience = 0 if quick else min(2 * self._impatience + 1, _MOST_IMPATIENT)
        self._impatient = self._impatience
        self._hear(loop)

    def _hear(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tell those in this event loop what became of their work."""
        with self._change:
            outcomes = self._told.pop(loop, [])
        for work, answer, error in outcomes:
            try:
                work.then(answer, error)
            except Exception:  # what one does with it is no reason not to tell the others
                _log.exception("Whoever was told what became of its work failed.")

    def _read(self, do: Callable[[Connection], T]) -> T:
        try:
            _require_in_place(self._files)
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
                self._computing = True
            self._run(lane, works)
            with self._change:
                self._busy.discard(lane)
                self._flushing = False
                if lane in self._waiting:
                    self._ready.append(lane)
                self._computed()

    def _run(self, lane: str, works: "list[_Work]") -> None:
        """Commit works together; where one of them is at fault, each by itself."""
        try:
            _require_in_place(self._files)
            durable = any(work.durable for work in works)
            with self._database.transaction(durable=durable, lane=lane) as connection:
                answers = _done(connection, works)
                with self._change:
                    self._flushing = durable
                    self._computed()
        except Exception as error:
            if len(works) > 1 and not is_away(error):
                for work in works:
                    self._run(lane, [work])
                return
            self._tell([(work, None, _unavailable(error)) for work in works])
            return
        self.num_commits += 1
        self._tell([(work, answer, None) for work, answer in zip(works, answers, strict=True)])

    def _computed(self) -> None:
        """Note that a writer does not need the interpreter now."""
        self._computing = False
        self._change.notify_all()

    def _tell(self, outcomes: "list[_Outcome]") -> None:
        """Tell what a group became; an event loop is woken once for all of them."""
        loops: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
        for work, answer, error in outcomes:
            if work.loop is None:
                work.then(answer, error)
            else:
                loops.setdefault(work.loop, []).append((work, answer, error))
        for loop, theirs in loops.items():
            with self._change:
                self._told.setdefault(loop, []).extend(theirs)
            try:
                loop.call_soon_threadsafe(self._hear, loop)
            except RuntimeError:  # a closed loop has nobody who waits
                self._told.pop(loop, None)


class Together(Generic[Item, T]):
    """Work that is done at once for all who wait with the same; `do_all` answers each of their items, in order."""

    def __init__(self, do_all: Callable[[Connection, list[Item]], Sequence[T]], item: Item) -> None:
        self.do_all = do_all
        self.item = item

    def __call__(self, connection: Connection) -> T:
        """Do it for this item alone."""
        return self.do_all(connection, [self.item])[0]


Then = Callable[[T | None, Exception | None], None]
"""Is told what a piece of work returned, or why it could not be done."""


@dataclass(frozen=True, slots=True)
class _Work:
    """Something to do in a transaction, and who is told: in `loop`, or in the writer's own thread."""

    do: Callable[[Connection], Any]
    durable: bool
    then: Then[Any]
    loop: asyncio.AbstractEventLoop | None = None


def _done(connection: Connection, works: list[_Work]) -> list[Any]:
    """The answers of works, done in their order; neighbours that can are done together."""
    answers: list[Any] = []
    for do_all, group in groupby(works, key=lambda work: work.do.do_all if isinstance(work.do, Together) else None):
        if do_all is None:
            answers += [work.do(connection) for work in group]
        else:
            answers += do_all(connection, [work.do.item for work in group if isinstance(work.do, Together)])
    return answers


_Outcome = tuple[_Work, Any, Exception | None]


def _resolve(result: "Future[Any] | asyncio.Future[Any]", answer: Any, error: Exception | None) -> None:
    if result.cancelled():
        return  # whoever waited has left
    if error is None:
        result.set_result(answer)
    else:
        result.set_exception(error)


def _files_of(path: str) -> dict[str, _Identity | None]:
    """SQLite's open file and its write-ahead log, which whoever opens another file under that name deletes."""
    return {each: _identity(each) for each in (path, f"{os.path.realpath(path)}-wal")}


def _require_in_place(files: dict[str, _Identity | None]) -> None:
    """Raise `_FileGone` where a path no longer leads to the file that was opened; it may come back."""
    for path, opened in files.items():
        if _identity(path) != opened:
            raise _FileGone(
                f"{path} is not the file that was opened. Put that back; where it is lost, restart the server."
            )


def _identity(path: str) -> _Identity | None:
    """Which file lies at a path, if one does."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def is_away(error: Exception) -> bool:
    """Whether the database failed, rather than what was asked of it."""
    return isinstance(error, _AWAY) and not isinstance(error, _OURS)


def _unavailable(error: Exception) -> Exception:
    if not is_away(error):
        return error
    _log.error("The billing store failed: %s", cause_of(error))
    told = "The billing store cannot be used at the moment, so nothing was generated. Try again shortly."
    unavailable = StoreUnavailable(told, retry_after_seconds=5)
    unavailable.__cause__ = error
    return unavailable
