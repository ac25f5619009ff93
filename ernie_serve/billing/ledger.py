"""The rules of money as SQL: hold, extend, charge, release, top up.

Knows the tables and what must stay true of them. Knows no thread, no clock and no key. Each function runs inside a
transaction that its caller opened for one account, and gives a value rather than an error when money does not suffice,
because a transaction is shared. After each of them

    balance  = sum of the account's ledger
    reserved = sum of its reservations
    reserved <= balance
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    Connection,
    bindparam,
    cast,
    delete,
    func,
    insert,
    select,
    update,
)

from ernie_serve.billing.keys import Caller
from ernie_serve.billing.money import Nano
from ernie_serve.billing.prepared import Prepared
from ernie_serve.billing.schema import account, ledger, reservation, usage_day

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


Bound = Literal["balance", "key", "project"]
"""What leaves a caller the least to spend: the account's balance, or the monthly limit of the key or of its project."""


@dataclass(frozen=True, slots=True)
class Held:
    """How many output tokens were reserved, what could still be spent before that, and what bounded it."""

    granted: bool
    tokens: int
    room_nano: int
    bound: Bound


def reserve(connection: Connection, ask: Ask, now: int) -> Held:
    """Hold money for a request, or say how many tokens of output could be paid."""
    room, bound = spendable(connection, ask.caller, now)
    affordable = room - ask.prompt_nano
    tokens = min(ask.want_tokens, affordable // ask.token_nano) if ask.token_nano else ask.want_tokens
    if affordable < 0 or tokens < ask.least_tokens:
        return Held(False, max(0, tokens) if affordable >= 0 else 0, room, bound)
    amount = ask.prompt_nano + tokens * ask.token_nano
    if not _hold(connection, ask.caller.account_id, amount):
        return Held(False, 0, room, bound)
    row = {
        "request_id": ask.request_id,
        "account_id": ask.caller.account_id,
        "project_id": ask.caller.project_id,
        "key_id": ask.caller.key_id,
        "amount_nano": amount,
        "boot_id": ask.boot_id,
        "created": now,
    }
    _INSERT_RESERVATION.changed(connection, row)
    return Held(True, tokens, room, bound)


def extend(connection: Connection, request_id: str, caller: Caller, tokens: int, token_nano: int, now: int) -> int:
    """Hold up to so many more tokens of output for a running request; return how many it became."""
    room = max(0, spendable(connection, caller, now)[0])
    tokens = min(tokens, room // token_nano) if token_nano else tokens
    amount = tokens * token_nano
    if tokens < 1 or not _RAISE_RESERVATION.changed(connection, {"row_id": request_id, "more": amount}):
        return 0
    if not _hold(
        connection, caller.account_id, amount
    ):  # pragma: no cover  # the account is taken: room is still there
        raise AssertionError("The account changed while this transaction had it.")
    return tokens


def release(connection: Connection, account_id: str, request_ids: list[str]) -> int:
    """Let the holds of an account's requests go for which nothing was computed; return how many there were."""
    held = close_all(connection, request_ids)
    if held:
        give_back(connection, account_id, sum(held.values()))
    return len(held)


def top_up(connection: Connection, account_id: str, nano: int, kind: str, ref: str, now: int) -> int | None:
    """Change a balance by hand, once for each `ref`; return the new one, or `None` where holds forbid it."""
    _TAKE.value(connection, {"row_id": account_id})
    if _BOOKED.value(connection, {"reference": ref}) is None:
        changed = _TOP_UP.changed(connection, {"row_id": account_id, "delta": nano})
        if not changed:
            return None
        row = {"account_id": account_id, "delta_nano": nano, "kind": kind, "ref": ref, "created": now}
        book(connection, [row])
    balance: int | None = _BALANCE.value(connection, {"row_id": account_id})
    return balance


def give_back(connection: Connection, account_id: str, held: int) -> None:
    """Let go of held money, whose reservations the caller has closed."""
    charge(connection, account_id, cost=0, held=held)


def charge(connection: Connection, account_id: str, *, cost: int, held: int) -> None:
    """Take from a balance what the caller books in the ledger, and let go of held money as `give_back` does."""
    _CHARGE.changed(connection, {"row_id": account_id, "cost": cost, "held": held})


def close_all(connection: Connection, request_ids: list[str]) -> dict[str, int]:
    """Take away the reservations of requests that have ended; what was held for each that had one."""
    return {row[0]: row[1] for row in _CLOSE_RESERVATIONS.rows(connection, {"row_ids": request_ids})}


def book(connection: Connection, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write entries of the ledger, whose amounts the caller adds to balances."""
    _INSERT_LEDGER.inserted(connection, entries)


def spendable(connection: Connection, caller: Caller, now: int) -> tuple[int, Bound]:
    """What a caller may still spend, the least of balance without holds and both monthly limits, and which that is."""
    rooms: list[tuple[int, Bound]] = [(unreserved(connection, caller.account_id), "balance")]
    if caller.limits.month_nano is not None:
        spent = spent_this_month(connection, caller.account_id, "key_id", caller.key_id, now)
        rooms.append((caller.limits.month_nano - spent, "key"))
    if caller.project_month_nano is not None:
        spent = spent_this_month(connection, caller.account_id, "project_id", caller.project_id, now)
        rooms.append((caller.project_month_nano - spent, "project"))
    return min(rooms)


def spent_this_month(connection: Connection, account_id: str, column: str, id_: str, now: int) -> int:
    """What a key or project has spent in this month, and holds."""
    spent = select(cast(func.coalesce(func.sum(usage_day.c.cost_nano), 0), BigInteger)).where(
        usage_day.c.account_id == account_id,
        usage_day.c[column] == id_,
        usage_day.c.day >= month_start(now),
        usage_day.c.day < month_end(now),  # a clock that once ran ahead has charged on days that are still to come
    )
    held = select(cast(func.coalesce(func.sum(reservation.c.amount_nano), 0), BigInteger)).where(
        reservation.c.account_id == account_id, reservation.c[column] == id_
    )
    return int(connection.execute(spent).scalar_one()) + int(connection.execute(held).scalar_one())


def month_start(now: int) -> int:
    """The first second of the month, in UTC."""
    today = datetime.datetime.fromtimestamp(now, datetime.UTC)
    return int(datetime.datetime(today.year, today.month, 1, tzinfo=datetime.UTC).timestamp())


def month_end(now: int) -> int:
    """The first second of the next month."""
    return month_start(month_start(now) + 31 * DAY)


def _hold(connection: Connection, account_id: str, amount: int) -> bool:
    """The guarded statement that makes an overdraft impossible."""
    return _HOLD.changed(connection, {"row_id": account_id, "amount": amount}) == 1


def unreserved(connection: Connection, account_id: str) -> int:
    """What of an account's balance nothing holds."""
    return _UNRESERVED.value(connection, {"row_id": account_id}) or 0


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
    .where(reservation.c.request_id == bindparam("row_id"))
    .values(amount_nano=reservation.c.amount_nano + bindparam("more"))
)
_CLOSE_RESERVATIONS = Prepared(
    delete(reservation)
    .where(reservation.c.request_id.in_(bindparam("row_ids", expanding=True)))
    .returning(reservation.c.request_id, reservation.c.amount_nano)
)
_INSERT_LEDGER = Prepared(insert(ledger), [column.name for column in ledger.c if column.name != "id"])
