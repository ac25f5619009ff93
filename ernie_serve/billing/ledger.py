"""The rules of money as SQL: hold, extend, settle, release, top up.

Knows the tables and what must stay true of them. Knows no thread, no clock and no key. Each function runs inside a
transaction that its caller opened for one account, and gives a value rather than an error when money does not suffice,
because a transaction is shared. After each of them

    balance  = sum of the account's ledger
    reserved = sum of its open reservations
    reserved <= balance
"""

import datetime
from dataclasses import dataclass

from sqlalchemy import (
    BigInteger,
    Connection,
    bindparam,
    cast,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from ernie_serve.billing.keys import Caller
from ernie_serve.billing.money import Nano
from ernie_serve.billing.prepared import Prepared
from ernie_serve.billing.prices import Status, Usage
from ernie_serve.billing.schema import account, ledger, reservation, usage_day, usage_event

DAY = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a request wants held: its prompt, and `want_tokens` of output, of which `least_tokens` would do."""

    request_id: str
    caller: Caller
    boot_id: str
    prompt_nano: Nano
    token_nano: int
    want_tokens: int
    least_tokens: int


@dataclass(frozen=True, slots=True)
class Held:
    """How many output tokens were reserved, and what the account could still spend before that."""

    granted: bool
    tokens: int
    room_nano: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """A request that has ended. `cost_nano` is what it costs by its prices."""

    request_id: str
    caller: Caller
    model: str
    price_version: int
    usage: Usage
    cost_nano: Nano
    status: Status
    finish_reason: str | None = None
    ttft_us: int | None = None
    total_us: int | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """What was charged. `again` says that it had been before; `waived_nano` is what no hold and no balance covered."""

    cost_nano: Nano
    again: bool = False
    waived_nano: int = 0


def reserve(connection: Connection, ask: Ask, now: int) -> Held:
    """Hold money for a request, or say how many tokens of output could be paid."""
    room = spendable(connection, ask.caller, now)
    affordable = room - ask.prompt_nano
    tokens = min(ask.want_tokens, affordable // ask.token_nano) if ask.token_nano else ask.want_tokens
    if affordable < 0 or tokens < ask.least_tokens:
        return Held(False, max(0, tokens) if affordable >= 0 else 0, room)
    amount = ask.prompt_nano + tokens * ask.token_nano
    if not _hold(connection, ask.caller.account_id, amount):
        return Held(False, 0, room)
    row = {
        "request_id": ask.request_id,
        "account_id": ask.caller.account_id,
        "project_id": ask.caller.project_id,
        "key_id": ask.caller.key_id,
        "amount_nano": amount,
        "state": "open",
        "boot_id": ask.boot_id,
        "created": now,
    }
    _INSERT_RESERVATION.changed(connection, row)
    return Held(True, tokens, room)


def extend(connection: Connection, request_id: str, caller: Caller, tokens: int, token_nano: int, now: int) -> int:
    """Hold up to so many more tokens of output for a running request; return how many it became."""
    room = max(0, spendable(connection, caller, now))
    tokens = min(tokens, room // token_nano) if token_nano else tokens
    amount = tokens * token_nano
    if tokens < 1 or not _RAISE_RESERVATION.changed(connection, {"row_id": request_id, "more": amount}):
        return 0
    if not _hold(
        connection, caller.account_id, amount
    ):  # pragma: no cover  # the account is taken: room is still there
        raise AssertionError("The account changed while this transaction had it.")
    return tokens


def settle(connection: Connection, bill: Bill, now: int) -> Settled:
    """Charge a request, let its hold go and write its usage, once however often it is called.

    Where the hold is gone or too small, which takes an outage of the store, what the balance does not cover is waived:
    a balance never goes below zero.
    """
    held = _CLOSE_RESERVATION.value(connection, {"row_id": bill.request_id, "to": "settled"})
    if held is None:
        before = _COST_OF.value(connection, {"row_id": bill.request_id})
        if before is not None:
            return Settled(Nano(before), again=True)
    held = held or 0
    cost = bill.cost_nano
    if cost > held:
        cost = Nano(min(cost, held + max(0, _unreserved(connection, bill.caller.account_id))))
    account_id = bill.caller.account_id
    if cost or held:
        _CHARGE.changed(connection, {"row_id": account_id, "cost": cost, "held": held})
    if cost:
        row = {"delta_nano": -cost, "kind": "usage", "ref": f"usage:{bill.request_id}", "created": now}
        _INSERT_LEDGER.changed(connection, row | {"account_id": account_id})
    _write_usage(connection, bill, cost, now)
    return Settled(cost, waived_nano=bill.cost_nano - cost)


def release(connection: Connection, request_id: str, account_id: str) -> bool:
    """Let a hold go for which nothing was computed. `False` when there was none."""
    held = _CLOSE_RESERVATION.value(connection, {"row_id": request_id, "to": "released"})
    if held is not None:
        give_back(connection, account_id, held)
    return held is not None


def top_up(connection: Connection, account_id: str, nano: int, kind: str, ref: str, now: int) -> int | None:
    """Change a balance by hand, once for each `ref`; return the new one, or `None` where holds forbid it."""
    _TAKE.value(connection, {"row_id": account_id})
    if _BOOKED.value(connection, {"reference": ref}) is None:
        changed = _TOP_UP.changed(connection, {"row_id": account_id, "delta": nano})
        if not changed:
            return None
        row = {"account_id": account_id, "delta_nano": nano, "kind": kind, "ref": ref, "created": now}
        _INSERT_LEDGER.changed(connection, row)
    balance: int | None = _BALANCE.value(connection, {"row_id": account_id})
    return balance


def booking(connection: Connection, ref: str) -> tuple[str, int, str] | None:
    """The account, the amount and the kind of what was booked under a reference."""
    query = select(ledger.c.account_id, ledger.c.delta_nano, ledger.c.kind).where(ledger.c.ref == ref)
    row = connection.execute(query).first()
    return None if row is None else (row[0], row[1], row[2])


def give_back(connection: Connection, account_id: str, held: int) -> None:
    """Let go of held money, whose reservations the caller has closed."""
    _CHARGE.changed(connection, {"row_id": account_id, "cost": 0, "held": held})


def spendable(connection: Connection, caller: Caller, now: int) -> int:
    """What a caller may still spend: the account's balance without its holds, within both monthly limits."""
    room = _unreserved(connection, caller.account_id)
    for limit, column, id_ in (
        (caller.limits.month_nano, "key_id", caller.key_id),
        (caller.project_month_nano, "project_id", caller.project_id),
    ):
        if limit is not None:
            room = min(room, limit - spent_this_month(connection, caller.account_id, column, id_, now))
    return room


def spent_this_month(connection: Connection, account_id: str, column: str, id_: str, now: int) -> int:
    """What a key or project has spent and holds since the month began."""
    spent = select(cast(func.coalesce(func.sum(usage_day.c.cost_nano), 0), BigInteger)).where(
        usage_day.c.account_id == account_id, usage_day.c[column] == id_, usage_day.c.day >= month_start(now)
    )
    held = select(cast(func.coalesce(func.sum(reservation.c.amount_nano), 0), BigInteger)).where(
        reservation.c.account_id == account_id, reservation.c[column] == id_, reservation.c.state == "open"
    )
    return int(connection.execute(spent).scalar_one()) + int(connection.execute(held).scalar_one())


def month_start(now: int) -> int:
    """The first second of the month, in UTC."""
    today = datetime.datetime.fromtimestamp(now, datetime.UTC)
    return int(datetime.datetime(today.year, today.month, 1, tzinfo=datetime.UTC).timestamp())


def _hold(connection: Connection, account_id: str, amount: int) -> bool:
    """The guarded statement that makes an overdraft impossible."""
    return _HOLD.changed(connection, {"row_id": account_id, "amount": amount}) == 1


def _unreserved(connection: Connection, account_id: str) -> int:
    return _UNRESERVED.value(connection, {"row_id": account_id}) or 0


def _write_usage(connection: Connection, bill: Bill, cost: int, now: int) -> None:
    usage, caller = bill.usage, bill.caller
    tokens = {
        "prompt": usage.prompt_tokens,
        "cached": usage.cached_tokens,
        "completion": usage.completion_tokens,
        "reasoning": usage.reasoning_tokens,
        "cost_nano": cost,
    }
    who = {
        "account_id": caller.account_id,
        "project_id": caller.project_id,
        "key_id": caller.key_id,
        "model": bill.model,
    }
    event = {
        "request_id": bill.request_id,
        "price_version": bill.price_version,
        "status": bill.status,
        "finish_reason": bill.finish_reason,
        "ttft_us": bill.ttft_us,
        "total_us": bill.total_us,
        "created": now,
    }
    _INSERT_USAGE.changed(connection, who | tokens | event)
    add = _ADD_TO_DAY[connection.dialect.name]
    add.changed(connection, who | tokens | {"day": now - now % DAY, "requests": 1})


_SUMS = ("requests", "prompt", "cached", "completion", "reasoning", "cost_nano")
_DAY_KEY = ("day", "account_id", "project_id", "key_id", "model")


def _add_to_day(dialect: "type[sqlite.Insert] | type[postgresql.Insert]") -> "sqlite.Insert | postgresql.Insert":
    statement = dialect(usage_day)
    more = {name: usage_day.c[name] + statement.excluded[name] for name in _SUMS}
    return statement.on_conflict_do_update(index_elements=list(_DAY_KEY), set_=more)


_UNRESERVED = Prepared(
    select(account.c.balance_nano - account.c.reserved_nano).where(account.c.id == bindparam("row_id"))
)
_HOLD = Prepared(
    update(account)
    .where(
        account.c.id == bindparam("row_id"),
        account.c.balance_nano - account.c.reserved_nano >= bindparam("amount", type_=BigInteger()),
    )
    .values(reserved_nano=account.c.reserved_nano + bindparam("amount"))
)
_CHARGE = Prepared(
    update(account)
    .where(account.c.id == bindparam("row_id"))
    .values(
        balance_nano=account.c.balance_nano - bindparam("cost"),
        reserved_nano=account.c.reserved_nano - bindparam("held"),
    )
)
_TAKE = Prepared(select(account.c.id).where(account.c.id == bindparam("row_id")).with_for_update())
_BOOKED = Prepared(select(ledger.c.id).where(ledger.c.ref == bindparam("reference")))
_BALANCE = Prepared(select(account.c.balance_nano).where(account.c.id == bindparam("row_id")))
_TOP_UP = Prepared(
    update(account)
    .where(account.c.id == bindparam("row_id"), account.c.balance_nano + bindparam("delta") >= account.c.reserved_nano)
    .values(balance_nano=account.c.balance_nano + bindparam("delta"))
)
_INSERT_RESERVATION = Prepared(insert(reservation))
_RAISE_RESERVATION = Prepared(
    update(reservation)
    .where(reservation.c.request_id == bindparam("row_id"), reservation.c.state == "open")
    .values(amount_nano=reservation.c.amount_nano + bindparam("more"))
)
_CLOSE_RESERVATION = Prepared(
    update(reservation)
    .where(reservation.c.request_id == bindparam("row_id"), reservation.c.state == "open")
    .values(state=bindparam("to"))
    .returning(reservation.c.amount_nano)
)
_COST_OF = Prepared(select(usage_event.c.cost_nano).where(usage_event.c.request_id == bindparam("row_id")))
_INSERT_LEDGER = Prepared(insert(ledger), [column.name for column in ledger.c if column.name != "id"])
_INSERT_USAGE = Prepared(insert(usage_event))
_ADD_TO_DAY = {"sqlite": Prepared(_add_to_day(sqlite.Insert)), "postgresql": Prepared(_add_to_day(postgresql.Insert))}
