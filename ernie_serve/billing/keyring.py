"""Tells who calls, believing what it read of a key for a few seconds.

Knows keys and the store. Knows no money. A key that is disabled is dead in every process at most `KEY_SECONDS` later.
"""

import asyncio
from contextlib import suppress
from functools import partial

from ernie_serve.billing import accounts
from ernie_serve.billing.clock import NS, Clock
from ernie_serve.billing.keys import Caller, public_id_of, same
from ernie_serve.billing.store import Store
from ernie_serve.errors import StoreUnavailable, Unauthorized

KEY_SECONDS = 5
"""How long a key is believed without asking the store again."""

_TOUCH_SECONDS = 60
_MAX_KEYS = 10_000


class Keyring:
    """The keys of a store. While it is away nobody is let in on an old belief: that is `StoreUnavailable`."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._seen: dict[str, tuple[int, accounts.KeyRecord | None]] = {}
        self._reading: dict[str, asyncio.Task[accounts.KeyRecord | None]] = {}
        self._touched: dict[str, int] = {}

    async def authenticate(self, key: str | None) -> Caller:
        """Whose key this is. One `Unauthorized` for a key that is missing, unknown, wrong, disabled or expired."""
        public_id = public_id_of(key) if key else None
        record = await self._record(public_id) if public_id else None
        right = same(key or "", record.secret_sha256 if record else "")
        if record is None or not right or not record.usable(self._clock.seconds()):
            raise Unauthorized("Incorrect API key provided, or none. Send a valid one as `Authorization: Bearer …`.")
        self._touch(record.caller.key_id)
        return record.caller

    def forget(self) -> None:
        """Ask for every key anew: something about keys was changed here."""
        self._seen.clear()
        self._reading.clear()

    async def _record(self, public_id: str) -> accounts.KeyRecord | None:
        asked = self._clock.now_ns()
        seen = self._seen.get(public_id)
        if seen is not None and asked - seen[0] < KEY_SECONDS * NS:
            return seen[1]
        reading = self._reading.get(public_id)
        if reading is None:  # whoever asks while it is read waits for the same
            reading = self._reading[public_id] = asyncio.ensure_future(self._read(public_id, asked))
        return await asyncio.shield(reading)

    async def _read(self, public_id: str, asked: int) -> accounts.KeyRecord | None:
        reading = asyncio.current_task()
        try:
            record = await self._store.read(partial(accounts.find_key, key_id=public_id))
        finally:
            believed = self._reading.get(public_id) is reading  # nothing was changed while it was read
            if believed:
                del self._reading[public_id]
        if believed:
            if len(self._seen) >= _MAX_KEYS:
                self._seen.clear()
                self._touched.clear()
            self._seen[public_id] = (asked, record)
        return record

    def _touch(self, key_id: str) -> None:
        """Note the use of a key, once a minute, without anybody waiting for it."""
        now = self._clock.seconds()
        if now - self._touched.get(key_id, 0) >= _TOUCH_SECONDS:
            self._touched[key_id] = now
            with suppress(StoreUnavailable):
                self._store.submit(partial(accounts.touch_key, key_id=key_id, now=now), durable=False)
