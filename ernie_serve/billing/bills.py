"""Charges requests that have ended, many at once: their holds go, and their usage is written.

Knows the ledger's rules and the tables of usage. Knows no thread, no clock and no key. Runs inside a transaction that
its caller opened.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from ernie_serve.billing import ledger
from ernie_serve.billing.keys import Caller
from ernie_serve.billing.ledger import DAY
from ernie_serve.billing.money import Nano
from ernie_serve.billing.prepared import Prepared
from ernie_serve.billing.prices import Status, Usage
from ernie_serve.billing.schema import usage_day, usage_event


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
    ended: int
    """When, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What was charged. `again` says that it had been before; `waived_nano` is what no hold and no balance covered."""

    cost_nano: Nano
    again: bool = False
    waived_nano: int = 0


def settle(connection: Connection, bills: Sequence[Bill]) -> list[Settled]:
    """Charge requests, let their holds go and write their usage, each once however often it is given.

    Where a hold is gone or too small, which takes an outage of the store, what the balance does not cover is waived: a
    balance never goes below zero. What comes of bills together is what would come of one after the other.
    """
    holds = ledger.close_all(connection, [bill.request_id for bill in bills])
    if len(holds) == len(bills) and all(bill.cost_nano <= holds[bill.request_id] for bill in bills):
        _book(connection, [_Line(bill, bill.cost_nano, holds[bill.request_id]) for bill in bills])
        return [Settled(bill.cost_nano) for bill in bills]
    return [_settle_alone(connection, bill, holds.pop(bill.request_id, None)) for bill in bills]


@dataclass(frozen=True, slots=True)
class _Line:
    """A bill, what is charged of it, and what was held for it."""

    bill: Bill
    cost: Nano
    held: int


def _settle_alone(connection: Connection, bill: Bill, held: int | None) -> Settled:
    """Charge what the hold and the balance cover of a request whose hold is closed, or was never there."""
    if held is None:
        before = _COST_OF.value(connection, {"row_id": bill.request_id})
        if before is not None:
            return Settled(Nano(before), again=True)
    held = held or 0
    cost = bill.cost_nano
    if cost > held:
        cost = Nano(min(cost, held + max(0, ledger.unreserved(connection, bill.caller.account_id))))
    _book(connection, [_Line(bill, cost, held)])
    return Settled(cost, waived_nano=bill.cost_nano - cost)


def _book(connection: Connection, lines: Sequence[_Line]) -> None:
    """Write what is charged wherever it counts, with one statement for each table where that can be."""
    sums: dict[str, tuple[int, int]] = {}
    for line in lines:
        cost, held = sums.get(line.bill.caller.account_id, (0, 0))
        sums[line.bill.caller.account_id] = cost + line.cost, held + line.held
    for account_id, (cost, held) in sums.items():
        if cost or held:
            ledger.charge(connection, account_id, cost=cost, held=held)
    if entries := [_entry(line) for line in lines if line.cost]:
        ledger.book(connection, entries)
    _INSERT_USAGE.inserted(connection, [_event(line) for line in lines])
    for row in _days(lines):
        _ADD_TO_DAY[connection.dialect.name].changed(connection, row)


def _entry(line: _Line) -> dict[str, Any]:
    bill = line.bill
    return {
        "account_id": bill.caller.account_id,
        "delta_nano": -line.cost,
        "kind": "usage",
        "ref": f"usage:{bill.request_id}",
        "created": bill.ended,
    }


def _event(line: _Line) -> dict[str, Any]:
    bill = line.bill
    usage, caller = bill.usage, bill.caller
    return {
        "request_id": bill.request_id,
        "account_id": caller.account_id,
        "project_id": caller.project_id,
        "key_id": caller.key_id,
        "model": bill.model,
        "price_version": bill.price_version,
        "prompt": usage.prompt_tokens,
        "cached": usage.cached_tokens,
        "completion": usage.completion_tokens,
        "reasoning": usage.reasoning_tokens,
        "cost_nano": line.cost,
        "status": bill.status,
        "finish_reason": bill.finish_reason,
        "ttft_us": bill.ttft_us,
        "total_us": bill.total_us,
        "created": bill.ended,
    }


_DAY_KEY = ("day", "account_id", "project_id", "key_id", "model")
_SUMS = ("requests", "prompt", "cached", "completion", "reasoning", "cost_nano")


def _days(lines: Sequence[_Line]) -> list[dict[str, Any]]:
    """What lines add to each row of `usage_day`."""
    days: dict[tuple[int, str, str, str, str], tuple[int, ...]] = {}
    for line in lines:
        bill, usage, caller = line.bill, line.bill.usage, line.bill.caller
        key = (bill.ended - bill.ended % DAY, caller.account_id, caller.project_id, caller.key_id, bill.model)
        tokens = (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, usage.reasoning_tokens)
        one = (1, *tokens, line.cost)
        days[key] = tuple(map(add, days[key], one)) if key in days else one
    return [dict(zip(_DAY_KEY + _SUMS, key + sums, strict=True)) for key, sums in days.items()]


def _add_to_day(dialect: "type[sqlite.Insert] | type[postgresql.Insert]") -> "sqlite.Insert | postgresql.Insert":
    statement = dialect(usage_day)
    more = {name: usage_day.c[name] + statement.excluded[name] for name in _SUMS}
    return statement.on_conflict_do_update(index_elements=list(_DAY_KEY), set_=more)


_COST_OF = Prepared(select(usage_event.c.cost_nano).where(usage_event.c.request_id == bindparam("row_id")))
_INSERT_USAGE = Prepared(insert(usage_event))
_ADD_TO_DAY = {"sqlite": Prepared(_add_to_day(sqlite.Insert)), "postgresql": Prepared(_add_to_day(postgresql.Insert))}
