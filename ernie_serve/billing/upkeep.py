"""What billing does beside the requests: settle what had to wait, say that this process lives, release dead holds.

Knows the store and the clock. Knows no price and no caller.

A hold belongs to the process that made it. SQLite is served by one process, so whatever is open when it starts is dead.
On PostgreSQL each process writes a heartbeat; one that has been silent for `DEAD_SECONDS` is taken for dead.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from sqlalchemy import Connection

from ernie_serve.billing import boots, idempotency, ledger
from ernie_serve.billing.boots import DEAD_SECONDS
from ernie_serve.billing.clock import NS, Clock
from ernie_serve.billing.meter import Counters
from ernie_serve.billing.store import Store
from ernie_serve.errors import StoreUnavailable

_BEAT_SECONDS = 10
_TIDY_SECONDS = 3600
_KEEP_BOOTS_SECONDS = 86_400

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Something that the store could not take. `told` is what a person needs to book it by hand.

    `then` is told what `do` returned, once that is written.
    """

    account_id: str
    do: Callable[[Connection], Any]
    told: str
    then: Callable[[Any], None] | None = None


_MAX_UNDONE = 65_536
"""Refused requests whose holds are let go later. What comes beyond is let go by the next start."""
_UNDONE_TOGETHER = 256

_NEVER_WRITTEN = "Never written to the billing store, book by hand: %s"


class Upkeep:
    """The background of one meter. `boot_id` names this process in the store."""

    def __init__(self, store: Store, clock: Clock, counters: Counters) -> None:
        self.boot_id = f"boot_{secrets.token_hex(8)}"
        self._store = store
        self._clock = clock
        self._counters = counters
        self._waiting: deque[Waiting] = deque()
        self._undone: deque[tuple[str, str]] = deque(maxlen=_MAX_UNDONE)  # accounts and requests
        self._stopped = False
        self._settling = asyncio.Lock()
        self._alive_since_ns: int | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Say that this process lives. Where it has the database to itself, release what any other held."""
        await self._store.write(self._beat)
        if self._store.embedded:
            await self._store.write(partial(boots.bury_others, boot_id=self.boot_id))
            await self._release_orphans(alive_since=0)
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Write what still waits; what cannot be written is logged. Then say that this process ends."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await self.settle_waiting()
        for waiting in self._waiting:
            _log.critical(_NEVER_WRITTEN, waiting.told)
        self._stopped = True
        with suppress(StoreUnavailable):
            await self._store.write(partial(boots.retire, boot_id=self.boot_id))

    def later(self, waiting: Waiting) -> None:
        """Keep what the store could not take, in order, until it can."""
        self._waiting.append(waiting)
        if self._stopped:
            _log.critical(_NEVER_WRITTEN, waiting.told)
        self._counters.unsettled = len(self._waiting)

    def undo_later(self, account_id: str, request_id: str) -> None:
        """Let go of what a request may hold that was refused because the store failed, once it answers again."""
        self._undone.append((account_id, request_id))

    async def settle_waiting(self) -> int:
        """Try to write what the store could not take before, charges first and in order; return how much still waits.

        Nothing is given up before it is written, so whoever is cancelled here loses nothing.
        """
        async with self._settling:
            try:
                await self._settle_charges()
                await self._undo_refused()
            except StoreUnavailable:
                self._counters.store_failures += 1
            return len(self._waiting) + len(self._undone)

    async def _settle_charges(self) -> None:
        while self._waiting:
            waiting = self._waiting[0]
            try:
                answer = await self._store.write(waiting.do, lane=waiting.account_id)
            except StoreUnavailable:
                raise
            except Exception:
                _log.critical("The billing store refuses this, book by hand: %s", waiting.told, exc_info=True)
            else:
                if waiting.then is not None:
                    waiting.then(answer)
            self._waiting.popleft()
            self._counters.unsettled = len(self._waiting)

    async def _undo_refused(self) -> None:
        while self._undone:
            account_id = self._undone[0][0]
            ids = [request_id for theirs, request_id in islice(self._undone, _UNDONE_TOGETHER) if theirs == account_id]
            try:
                await self._store.write(partial(undo, account_id=account_id, request_ids=ids), lane=account_id)
            except StoreUnavailable:
                raise
            except Exception:
                _log.exception("The billing store refuses to let holds of account %s go; a start does.", account_id)
            for each in {(account_id, request_id) for request_id in ids}:
                with suppress(ValueError):  # others may have taken its room
                    self._undone.remove(each)

    async def beat(self) -> None:
        """Say that this process lives, and release what dead ones hold.

        After an outage of the store nobody is buried until all have had the time to say that they live.
        """
        try:
            now = await self._store.write(self._beat, durable=False)
            if self._alive_since_ns is None:
                self._alive_since_ns = self._clock.now_ns()
            if self._clock.now_ns() - self._alive_since_ns >= DEAD_SECONDS * NS:
                await self._release_orphans(alive_since=now - DEAD_SECONDS)
        except StoreUnavailable:
            self._alive_since_ns = None
            self._counters.store_failures += 1

    def _beat(self, connection: Connection) -> int:
        now = boots.database_time(connection)
        boots.beat(connection, self.boot_id, now)
        return now

    def _tidy(self, connection: Connection) -> None:
        now = self._clock.seconds()
        boots.forget_old(connection, now - _KEEP_BOOTS_SECONDS)
        idempotency.forget_old(connection, now)

    async def _release_orphans(self, alive_since: int) -> None:
        for account_id in await self._store.read(partial(boots.orphaned_accounts, alive_since=alive_since)):
            release = partial(boots.release_orphans, account_id=account_id, alive_since=alive_since)
            released = await self._store.write(release, lane=account_id)
            self._counters.orphans_released += released
            _log.warning("Released %d holds of processes that are gone, of account %s.", released, account_id)
        await self._store.write(partial(idempotency.forget_dead, alive_since=alive_since), durable=False)

    async def _keep(self) -> None:
        """Do all this for as long as the server runs."""
        beat_at = tidy_at = self._clock.now_ns()
        while True:
            await asyncio.sleep(1)
            now_ns = self._clock.now_ns()
            try:
                if self._waiting or self._undone:
                    await self.settle_waiting()
                if not self._store.embedded and now_ns >= beat_at:
                    beat_at = now_ns + _BEAT_SECONDS * NS
                    await self.beat()
                if now_ns >= tidy_at:
                    tidy_at = now_ns + _TIDY_SECONDS * NS
                    await self._store.write(self._tidy, durable=False)
            except StoreUnavailable:
                self._counters.store_failures += 1
            except Exception:
                _log.exception("Billing's upkeep failed, and goes on.")


def undo(connection: Connection, account_id: str, request_ids: list[str]) -> None:
    """Let go of what requests of one account hold for which nothing was computed, and of their idempotency keys."""
    ledger.release(connection, account_id, request_ids)
    for request_id in request_ids:
        idempotency.end(connection, request_id, answered=False)
