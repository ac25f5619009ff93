"""The rules of money against a model so plain that it cannot be wrong, for ten thousand random operations."""

import sqlite3
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from ernie_serve.billing import bills, boots, ledger
from ernie_serve.billing.database import Database
from ernie_serve.billing.keys import Caller, KeyLimits
from ernie_serve.billing.money import Nano
from ernie_serve.billing.office import NewKey, open_key
from ernie_serve.billing.prices import Prices, Usage
from ernie_serve.billing.reports import problems

CREDIT = 3_000_000
START = 1_800_000_000

ADDED_UP = """
    SELECT balance_nano, reserved_nano,
        (SELECT coalesce(sum(delta_nano), 0) FROM ledger),
        (SELECT coalesce(sum(amount_nano), 0) FROM reservation),
        (SELECT coalesce(sum(cost_nano), 0) FROM usage_event),
        (SELECT coalesce(-sum(delta_nano), 0) FROM ledger WHERE kind = 'usage'),
        (SELECT coalesce(sum(cost_nano), 0) FROM usage_day)
    FROM account"""


@dataclass
class Running:
    """What the model knows of a request: what is held, for how many tokens of output, and at which prices."""

    held: int
    covered: int
    prompt: int
    prices: Prices


class Money(RuleBasedStateMachine):
    """Random operations on an account with a monthly limit; after each of them everything adds up."""

    operations: ClassVar[int] = 0
    make_url: ClassVar[Callable[[], str]]

    @initialize(limited=st.booleans())
    def begin(self, limited: bool) -> None:
        url = type(self).make_url()
        self.database = Database(url, synchronous=False)
        self.plain = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        self.limit = 2 * CREDIT if limited else None
        self.now, self.month_spent = START, 0
        self.balance, self.spent, self.boots, self.count = CREDIT, 0, 1, 0
        self.running: dict[str, Running] = {}
        self.ended: dict[str, int] = {}
        self.prices = Prices()
        new = self.do(open_key, "k", now=START, credit_nano=CREDIT)
        limits = KeyLimits(month_nano=self.limit)
        self.caller = Caller(account_id=new.account_id, project_id=new.project_id, key_id=new.key_id, limits=limits)
        self.do(boots.beat, self.boot, START)

    @property
    def boot(self) -> str:
        return f"boot{self.boots}"

    @property
    def reserved(self) -> int:
        return sum(each.held for each in self.running.values())

    @property
    def room(self) -> int:
        room = self.balance - self.reserved
        return room if self.limit is None else min(room, self.limit - self.month_spent - self.reserved)

    def do(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.database.transaction(durable=False, lane="") as connection:
            return work(connection, *args, **kwargs)

    @rule(prompt=st.integers(0, 3000), want=st.integers(0, 4000), least=st.integers(0, 100))
    def reserve(self, prompt: int, want: int, least: int) -> None:
        least = want * least // 100
        self.count += 1
        name, prices, room = f"r{self.count}", self.prices, self.room
        ask = ledger.Ask(
            request_id=name,
            caller=self.caller,
            boot_id=self.boot,
            prompt_nano=prices.prompt_hold(prompt),
            token_nano=prices.output_nano,
            want_tokens=want,
            least_tokens=least,
        )
        held = self.do(ledger.reserve, ask, self.now)
        affordable = room - prompt * prices.input_nano
        tokens = min(want, affordable // prices.output_nano)
        assert held.granted == (affordable >= 0 and tokens >= least)
        assert held.room_nano == room
        if held.granted:
            assert held.tokens == tokens
            amount = prompt * prices.input_nano + tokens * prices.output_nano
            self.running[name] = Running(amount, tokens, prompt, prices)

    def pick(self, which: int) -> tuple[str, Running]:
        name = sorted(self.running)[which % len(self.running)]
        return name, self.running[name]

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), more=st.integers(0, 1500))
    def lease(self, which: int, more: int) -> None:
        name, running = self.pick(which)
        expected = min(more, max(0, self.room) // running.prices.output_nano)
        given = self.do(ledger.extend, name, self.caller, more, running.prices.output_nano, self.now)
        assert given == expected
        running.covered += given
        running.held += given * running.prices.output_nano

    @precondition(lambda self: self.running)
    @rule(
        which=st.integers(0, 99),
        share=st.integers(0, 100),
        cached=st.integers(0, 100),
        status=st.sampled_from(["ok", "cancelled", "failed"]),
    )
    def settle(self, which: int, share: int, cached: int, status: Any) -> None:
        name, running = self.pick(which)
        sent, cached = running.covered * share // 100, running.prompt * cached // 100
        prices = running.prices
        cost = (running.prompt - cached) * prices.input_nano + cached * prices.cached_nano + sent * prices.output_nano
        cost = 0 if status == "failed" else cost
        assert cost <= running.held
        usage = Usage(prompt_tokens=running.prompt, completion_tokens=sent, cached_tokens=cached)
        (settled,) = self.do(bills.settle, [self.bill(name, usage, prices.cost(usage, status), status)])
        assert (settled.cost_nano, settled.again, settled.waived_nano) == (cost, False, 0)
        del self.running[name]
        self.ended[name] = cost
        self.charge(cost)

    @precondition(lambda self: self.running)
    @rule(shares=st.lists(st.integers(0, 100), min_size=1, max_size=6), again=st.booleans())
    def settle_together(self, shares: list[int], again: bool) -> None:
        picked = list(zip(sorted(self.running), shares, strict=False))
        given, expected = [], []
        for name, share in picked:
            running = self.running.pop(name)
            usage = Usage(prompt_tokens=running.prompt, completion_tokens=running.covered * share // 100)
            cost = running.prices.cost(usage)
            given.append(self.bill(name, usage, cost))
            expected.append((cost, False))
            self.ended[name] = cost
            self.charge(cost)
        if again:
            given.append(given[0])
            expected.append((expected[0][0], True))
        settled = self.do(bills.settle, given)
        assert [(each.cost_nano, each.again) for each in settled] == expected

    def charge(self, cost: int) -> None:
        self.balance -= cost
        self.spent += cost
        self.month_spent += cost

    def bill(self, name: str, usage: Usage, cost: Any, status: Any = "ok") -> bills.Bill:
        return bills.Bill(
            request_id=name,
            caller=self.caller,
            model="m",
            price_version=1,
            usage=usage,
            cost_nano=cost,
            status=status,
            ended=self.now,
        )

    @precondition(lambda self: self.ended)
    @rule(which=st.integers(0, 99))
    def settle_again(self, which: int) -> None:
        name = sorted(self.ended)[which % len(self.ended)]
        (settled,) = self.do(bills.settle, [self.bill(name, Usage(prompt_tokens=5), 350)])
        assert (settled.cost_nano, settled.again) == (self.ended[name], True)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def cancel_before_prefill(self, which: int) -> None:
        name, _ = self.pick(which)
        assert self.do(ledger.release, self.caller.account_id, [name]) == 1
        assert not self.do(ledger.release, self.caller.account_id, [name])
        del self.running[name]

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), sent=st.integers(0, 2000))
    def crash_and_restart(self, which: int, sent: int) -> None:
        name, running = self.pick(which)
        self.boots += 1
        self.do(boots.beat, self.boot, self.now)
        self.do(boots.bury_others, self.boot)
        assert self.do(boots.orphaned_accounts, 0) == [self.caller.account_id]
        assert self.do(boots.release_orphans, self.caller.account_id, 0) == len(self.running)
        assert self.do(boots.orphaned_accounts, 0) == []
        self.running.clear()
        # One of them was not dead, only silent: it is charged what is still there.
        usage = Usage(prompt_tokens=running.prompt, completion_tokens=sent)
        wanted = running.prices.cost(usage)
        (settled,) = self.do(bills.settle, [self.bill(name, usage, wanted)])
        assert settled.cost_nano == min(wanted, self.balance)
        assert settled.waived_nano == wanted - settled.cost_nano
        self.ended[name] = settled.cost_nano
        self.charge(settled.cost_nano)

    @rule(input_nano=st.integers(1, 200), output_nano=st.integers(1, 900), discount=st.booleans())
    def change_prices(self, input_nano: int, output_nano: int, discount: bool) -> None:
        cached = input_nano // 2 if discount else input_nano
        self.prices = Prices(input_nano=input_nano, cached_nano=cached, output_nano=output_nano)

    @rule(nano=st.integers(-CREDIT, CREDIT))
    def change_balance(self, nano: int) -> None:
        self.count += 1
        possible = self.balance + nano >= self.reserved
        for _ in range(2):  # the same reference counts once
            balance = self.do(ledger.top_up, self.caller.account_id, nano, "adjust", f"a{self.count}", self.now)
            assert balance == (self.balance + nano if possible else None)
        self.balance += nano if possible else 0

    @rule(days=st.integers(0, 20))
    def wait(self, days: int) -> None:
        month = ledger.month_start(self.now)
        self.now += days * ledger.DAY
        if ledger.month_start(self.now) != month:
            self.month_spent = 0

    @invariant()
    def everything_adds_up(self) -> None:
        if not hasattr(self, "caller"):
            return
        type(self).operations += 1
        (row,) = self.plain.execute(ADDED_UP).fetchall()
        balance, reserved = self.balance, self.reserved
        assert row == (balance, reserved, balance, reserved, self.spent, self.spent, self.spent)
        assert 0 <= reserved <= balance

    def teardown(self) -> None:
        if hasattr(self, "caller"):
            assert self.do(problems) == []
            self.plain.close()
            self.database.close()


def test_ten_thousand_random_operations_add_up(new_file: Callable[[], str]) -> None:
    machine = type("Machine", (Money,), {"make_url": staticmethod(new_file), "operations": 0})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=440,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert machine.operations >= 10_000


def test_what_is_settled_together_is_what_is_settled_in_turn(url: str) -> None:
    """Of two accounts, four keys, two days, two models; then with a hold that is gone and one that is too small."""
    database, prompt = Database(url), 100 * PRICES.input_nano
    try:
        with database.transaction(durable=True, lane="") as connection:
            boots.beat(connection, "boot", START)
            keys = [
                open_key(connection, f"{n}", now=START, credit_nano=10 * prompt, account="ab"[n % 2]) for n in range(4)
            ]
            given = [bill_of(connection, keys[number % 4], number) for number in range(12)]
        for wrong in (False, True):
            if wrong:
                with database.transaction(durable=True, lane="") as connection:
                    assert ledger.release(connection, keys[1].account_id, ["r1"]) == 1
                given[6] = replace(given[6], cost_nano=Nano(100 * prompt))
            assert outcome(database, [given]) == outcome(database, [[bill] for bill in given])
    finally:
        database.close()


def bill_of(connection: Connection, key: NewKey, number: int) -> bills.Bill:
    """Hold the money of a request, and what it is charged then."""
    caller = Caller(account_id=key.account_id, project_id=key.project_id, key_id=key.key_id, limits=KeyLimits())
    prompt = PRICES.prompt_hold(100)
    hold = {"prompt_nano": prompt, "token_nano": 280, "want_tokens": 0, "least_tokens": 0}
    ask = ledger.Ask(request_id=f"r{number}", caller=caller, boot_id="boot", **hold)
    assert ledger.reserve(connection, ask, START).granted
    usage = Usage(prompt_tokens=100 - number)
    return bills.Bill(
        request_id=ask.request_id,
        caller=caller,
        model=f"m{number % 3 // 2}",
        price_version=1,
        usage=usage,
        cost_nano=PRICES.cost(usage, "failed" if number == 5 else "ok"),
        status="failed" if number == 5 else "ok",
        ended=START + number // 8 * ledger.DAY,
    )


def outcome(database: Database, groups: list[list[bills.Bill]]) -> list[Any]:
    """What comes of settling these groups, which is then undone."""
    found: list[Any] = []
    with suppress(ZeroDivisionError), database.transaction(durable=True, lane="") as connection:
        found += [each for group in groups for each in bills.settle(connection, group)]
        assert problems(connection) == []
        for table, columns in (
            ("account", "id, balance_nano, reserved_nano"),
            ("reservation", "request_id, amount_nano"),
            ("ledger", "ref, account_id, delta_nano, kind, created"),
            ("usage_event", "*"),
            ("usage_day", "*"),
        ):
            found.append(sorted(map(tuple, connection.exec_driver_sql(f"SELECT {columns} FROM {table}")), key=repr))
        raise ZeroDivisionError
    return found


PRICES = Prices()


def test_the_tables_themselves_forbid_an_overdraft(small_shop: Any) -> None:
    database = Database(small_shop.url)
    try:
        with database.transaction(durable=True, lane="") as connection:
            open_key(connection, "k", now=1, credit_nano=10)
        for change in ("reserved_nano = 11", "balance_nano = -1", "reserved_nano = -1"):
            with pytest.raises(IntegrityError), database.transaction(durable=True, lane="") as connection:
                connection.exec_driver_sql(f"UPDATE account SET {change}")
    finally:
        database.close()


def test_months_are_those_of_the_calendar() -> None:
    assert ledger.month_start(1_800_000_000) == 1_798_761_600  # 15 January 2027, and its first
    assert ledger.month_start(1_798_761_600) == 1_798_761_600
    assert ledger.month_start(1_798_761_599) == 1_796_083_200
    starts = [ledger.month_start(1_798_761_600)]
    for _ in range(15):
        starts.append(ledger.month_end(starts[-1]))
        assert ledger.month_end(starts[-1] - 1) == starts[-1]
    days = [(end - start) // ledger.DAY for start, end in pairwise(starts)]
    assert days == [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31, 31, 29, 31]
