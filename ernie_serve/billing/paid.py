"""The meter that charges: keys, limits and holds before a request, its usage in the ledger after it.

Knows the order in which these happen, and what to do while the store is away: new requests are refused, running ones
finish and are charged when it is back. Knows no SQL and no HTTP.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection

from ernie_serve.billing import bills, idempotency, ledger, price_lists
from ernie_serve.billing.clock import Clock
from ernie_serve.billing.keyring import Keyring
from ernie_serve.billing.keys import Caller
from ernie_serve.billing.limits import Limiter
from ernie_serve.billing.meter import AlreadyAnswered, Charge, Charging, Counters, Order, Reservation
from ernie_serve.billing.money import format_usd
from ernie_serve.billing.prices import Prices, Status, Usage
from ernie_serve.billing.store import Store, Together
from ernie_serve.billing.upkeep import Upkeep, Waiting, undo
from ernie_serve.errors import PaymentRequired, RateLimited, StoreUnavailable

P = ParamSpec("P")
T = TypeVar("T")

_CLOSE_SECONDS = 10


class PaidMeter:
    """Billing over a store. Made by `open`; close it last, when every reservation is settled."""

    charges = True

    def __init__(self, store: Store, prices: Prices, clock: Clock) -> None:
        self.counters = Counters()
        self.upkeep = Upkeep(store, clock, self.counters)
        self._store = store
        self.prices = prices
        self._clock = clock
        self._limiter = Limiter(clock.now_ns)
        self._keyring = Keyring(store, clock)
        self._charging: set[Charging] = set()

    @classmethod
    async def open(cls, store: Store, model: str, prices: Prices, clock: Clock | None = None) -> "PaidMeter":
        """Begin to charge: make `prices` current, say that this process lives, release what dead ones held."""
        clock = clock or Clock()
        stored = await store.write(partial(price_lists.set_prices, model=model, prices=prices, now=clock.seconds()))
        meter = cls(store, stored, clock)
        await meter.upkeep.start()
        return meter

    async def authenticate(self, key: str | None) -> Caller:
        """Whose key this is; see `Meter.authenticate`."""
        return await self._keyring.authenticate(key)

    async def reserve(self, caller: Caller, order: Order) -> Reservation:
        """Hold money for a request; see `Meter.reserve`."""
        caller.require("inference")
        if order.idempotency_key is not None:
            idempotency.hash_key(order.idempotency_key)  # a wrong one must not end up in others' transaction
        try:
            self._limiter.take(caller, order.prompt_tokens + order.want_tokens)
        except RateLimited:
            self.counters.refused_rate += 1
            raise
        try:
            held = await self._admit(caller, order)
        except BaseException:
            self._limiter.end(caller, order.prompt_tokens + order.want_tokens, refused=True)
            raise
        self.counters.reserved += 1
        return Reservation(caller, order, self.prices, held, self._extend)

    def settle(
        self,
        reservation: Reservation,
        usage: Usage,
        status: Status,
        *,
        finish_reason: str | None = None,
        ttft_us: int | None = None,
        total_us: int | None = None,
    ) -> Charging:
        """Charge a request; see `Meter.settle`."""
        if reservation.charge is None:
            usage = _within(usage, reservation.covered)
            bill = bills.Bill(
                request_id=reservation.order.request_id,
                caller=reservation.caller,
                model=reservation.order.model,
                price_version=reservation.prices.version,
                usage=usage,
                cost_nano=reservation.prices.cost(usage, status),
                status=status,
                finish_reason=finish_reason,
                ttft_us=ttft_us,
                total_us=total_us,
                ended=self._clock.seconds(),
            )
            order = reservation.order
            used = usage.prompt_tokens + usage.completion_tokens
            self._limiter.end(reservation.caller, order.prompt_tokens + order.want_tokens - used)
            claimed = order.idempotency_key is not None
            do = Together(_settle_claimed if claimed else bills.settle, bill)
            reservation.charge = charging = Charging()
            self._charging.add(charging)
            self._store.hand_in(do, partial(self._charged, bill, do, charging), lane=bill.caller.account_id)
        return reservation.charge

    async def report(self, read: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Read; see `Meter.report`."""
        return await self._store.read(lambda connection: read(connection, *args, **kwargs))

    async def change(self, do: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Write; see `Meter.change`. Keys are asked for anew afterwards."""
        answer = await self._store.write(lambda connection: do(connection, *args, **kwargs))
        self._keyring.forget()
        return answer

    def rate_headers(self, caller: Caller) -> dict[str, str]:
        """`x-ratelimit-…` for an answer to this caller."""
        return self._limiter.headers(caller)

    async def close(self) -> None:
        """Write what still waits and let go of the store. What cannot be written is logged, to be booked by hand."""
        if self._charging:
            ends = [asyncio.ensure_future(each) for each in self._charging]
            await asyncio.wait(ends, timeout=_CLOSE_SECONDS)
        await self.upkeep.stop()
        await asyncio.to_thread(self._store.close)

    async def _admit(self, caller: Caller, order: Order) -> int:
        """Hold money for a request; return the output tokens it covers."""
        prices, now = self.prices, self._clock.seconds()
        ask = ledger.Ask(
            request_id=order.request_id,
            caller=caller,
            boot_id=self.upkeep.boot_id,
            prompt_nano=prices.prompt_hold(order.prompt_tokens),
            token_nano=prices.output_nano,
            want_tokens=order.want_tokens,
            least_tokens=order.least_tokens,
        )
        do = partial(_reserve_once, order=order, ask=ask, now=now)
        try:
            held = await self._store.write(do, lane=caller.account_id, durable=False)
        except asyncio.CancelledError:
            with suppress(StoreUnavailable):  # what was handed in before is done before
                do_not = partial(undo, account_id=caller.account_id, request_ids=[order.request_id])
                self._store.submit(do_not, lane=caller.account_id, durable=False)
            raise
        except StoreUnavailable:
            self.counters.store_failures += 1
            self.upkeep.undo_later(caller.account_id, order.request_id)
            raise
        if isinstance(held, idempotency.Earlier):
            raise AlreadyAnswered(idempotency.replayed(held, order.body_sha256))
        if not held.granted:
            self.counters.refused_payment += 1
            raise _too_poor(order, held, ask)
        return held.tokens

    async def _extend(self, reservation: Reservation, tokens: int) -> int:
        """Hold more for a running request; one lease on trust where the store is away."""
        request_id, caller = reservation.order.request_id, reservation.caller
        extend = partial(
            ledger.extend,
            request_id=request_id,
            caller=caller,
            tokens=tokens,
            token_nano=reservation.prices.output_nano,
            now=self._clock.seconds(),
        )
        try:
            return await self._store.write(extend, lane=caller.account_id, durable=False)
        except StoreUnavailable:
            self.counters.store_failures += 1
            self.counters.unsecured_leases += 1
            return tokens

    def _charged(
        self,
        bill: bills.Bill,
        do: Callable[[Connection], bills.Settled],
        charging: Charging,
        settled: bills.Settled | None,
        error: Exception | None,
    ) -> None:
        """Count a charge, or keep it for later, and tell who waits for it, all in one turn of the event loop."""
        self._charging.discard(charging)
        if isinstance(error, StoreUnavailable):
            self.counters.store_failures += 1
            told = f"{bill}, {format_usd(bill.cost_nano)} USD"
            self.upkeep.later(Waiting(bill.caller.account_id, do, told, self._count))
            charging.end(Charge(bill.cost_nano, bill.usage, bill.price_version, kept=False))
        elif settled is None:
            charging.end(None, error)
        else:
            self._count(settled)
            charging.end(Charge(settled.cost_nano, bill.usage, bill.price_version))

    def _count(self, settled: bills.Settled) -> None:
        """Count a charge: once, when it is known to be written, be that at the first attempt or a later one."""
        self.counters.settled += 1
        self.counters.charged_nano += settled.cost_nano
        self.counters.waived_nano += settled.waived_nano


def _reserve_once(
    connection: Connection, order: Order, ask: ledger.Ask, now: int
) -> "ledger.Held | idempotency.Earlier":
    if order.idempotency_key is not None:
        earlier = idempotency.begin(
            connection, ask.caller.key_id, order.idempotency_key, order.body_sha256, ask.request_id, ask.boot_id, now
        )
        if earlier is not None:
            return earlier
    held = ledger.reserve(connection, ask, now)
    if not held.granted and order.idempotency_key is not None:
        idempotency.end(connection, ask.request_id, answered=False)
    return held


def _settle_claimed(connection: Connection, ended: Sequence[bills.Bill]) -> list[bills.Settled]:
    settled = bills.settle(connection, ended)
    for bill in ended:
        idempotency.end(connection, bill.request_id, answered=bill.status == "ok")
    return settled


def _within(usage: Usage, covered: int) -> Usage:
    """No more output than was held: an overdraft is impossible by construction."""
    completion = min(usage.completion_tokens, covered)
    reasoning = min(usage.reasoning_tokens, completion)
    return replace(usage, completion_tokens=completion, reasoning_tokens=reasoning)


def _too_poor(order: Order, held: ledger.Held, ask: ledger.Ask) -> PaymentRequired:
    """Both numbers, in tokens and in money, and what to raise; where no length was named, what it takes to begin."""
    needed = ask.prompt_nano + ask.least_tokens * ask.token_nano
    asked = order.least_tokens // order.n
    told = f"fewer `{order.length_param}`: you requested up to {asked} tokens, but"
    if order.max_tokens is None:
        told = f"`{order.length_param}`: without it there must be enough for at least {asked} tokens, and you"
    remedy, what, until = "more credit,", "the account's balance", ""
    if held.bound != "balance":
        remedy = f"a higher monthly limit of its {held.bound}, a new month,"
        what, until = f"the {held.bound}'s monthly limit", " until the month ends, in UTC"
    return PaymentRequired(
        f"This request needs {remedy} or {told} can only afford {held.tokens // order.n}. It would hold "
        f"{format_usd(needed)} USD, for {order.prompt_tokens} prompt tokens and {order.n} x {asked} of output; {what} "
        f"leaves {format_usd(max(0, held.room_nano))} USD{until}.",
        param=order.length_param,
    )
