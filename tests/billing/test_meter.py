"""The whole meter against a model so plain that it cannot be wrong, for hundreds of random operations on each store."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
from sqlalchemy import Connection, create_engine, update

from ernie_serve.billing.clock import Clock
from ernie_serve.billing.database import Database
from ernie_serve.billing.keys import Caller
from ernie_serve.billing.meter import Order, Reservation
from ernie_serve.billing.office import open_key, top_up
from ernie_serve.billing.paid import PaidMeter
from ernie_serve.billing.price_lists import set_prices
from ernie_serve.billing.prices import Prices, Usage
from ernie_serve.billing.reports import problems
from ernie_serve.billing.schema import boot
from ernie_serve.billing.store import Store
from ernie_serve.errors import PaymentRequired

CREDIT = 5_000_000


@dataclass
class Running:
    """What the model knows of a request: how much is held for it, and at which prices."""

    reservation: Reservation
    prices: Prices
    prompt: int
    held: int


@dataclass
class Account:
    """An account as the model has it."""

    caller: Caller
    balance: int = CREDIT
    running: dict[str, Running] = field(default_factory=dict)

    @property
    def room(self) -> int:
        return self.balance - sum(each.held for each in self.running.values())


class Money(RuleBasedStateMachine):
    """Random operations on two accounts, each compared with the model; afterwards everything adds up."""

    operations: ClassVar[int] = 0
    make_url: ClassVar[Any]

    @initialize()
    def begin(self) -> None:
        self.time = 1_800_000_000
        self.url = type(self).make_url()
        self.runner = asyncio.Runner()
        self.prices = Prices()
        self.count = 0
        self.plain: Connection | None = None
        self.settled: list[tuple[Reservation, int]] = []
        self.meter = self.open()
        self.accounts = []
        for name in ("a", "b"):
            new = self.run(self.meter.change(open_key, "k", now=self.time, account=name, credit_nano=CREDIT))
            self.accounts.append(Account(self.run(self.meter.authenticate(new.key))))

    def open(self) -> PaidMeter:
        clock = Clock(lambda: self.time, lambda: self.time * 10**9)
        store = Store(Database(self.url, synchronous=False))
        return self.run(PaidMeter.open(store, "ernie", self.prices, clock))

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def settled_now(self, *given: Any) -> Any:
        async def settle() -> Any:
            return await self.meter.settle(*given)

        return self.run(settle())

    @rule(
        which=st.integers(0, 1),
        prompt=st.integers(0, 3000),
        max_tokens=st.none() | st.integers(0, 4000),
        most=st.integers(0, 5000),
        n=st.integers(1, 3),
    )
    def reserve(self, which: int, prompt: int, max_tokens: int | None, most: int, n: int) -> None:
        account = self.accounts[which]
        self.count += 1
        name = f"r{self.count}"
        each = most if max_tokens is None else min(max_tokens, most)
        want, least = (n * min(1024, each), n * min(256, each)) if max_tokens is None else (n * each, n * each)
        left = account.room - prompt * self.prices.input_nano
        tokens = min(want, left // self.prices.output_nano)
        order = Order(
            request_id=name, model="ernie", prompt_tokens=prompt, max_tokens=max_tokens, most_tokens=most, n=n
        )
        try:
            reservation = self.run(self.meter.reserve(account.caller, order))
        except PaymentRequired:
            assert left < 0 or tokens < least
            return
        assert left >= 0
        assert reservation.covered == tokens >= least
        held = prompt * self.prices.input_nano + tokens * self.prices.output_nano
        account.running[name] = Running(reservation, self.prices, prompt, held)

    def pick(self, data: st.DataObject) -> tuple[Account, str, Running]:
        account = data.draw(st.sampled_from([each for each in self.accounts if each.running]))
        name = data.draw(st.sampled_from(sorted(account.running)))
        return account, name, account.running[name]

    @precondition(lambda self: any(each.running for each in self.accounts))
    @rule(data=st.data(), more=st.integers(0, 1500))
    def lease(self, data: st.DataObject, more: int) -> None:
        account, _, running = self.pick(data)
        reservation, before = running.reservation, running.reservation.covered

        async def cover() -> bool:
            covered = await reservation.cover(before + more)
            if reservation._extending is not None:
                await reservation._extending
            return covered

        room = account.room
        assert self.run(cover()) == (before + more <= reservation.covered)
        added = (reservation.covered - before) * running.prices.output_nano
        assert 0 <= added <= max(0, room)
        assert reservation.covered <= reservation.most
        running.held += added

    @precondition(lambda self: any(each.running for each in self.accounts))
    @rule(data=st.data(), share=st.integers(0, 110), status=st.sampled_from(["ok", "cancelled", "failed"]))
    def settle(self, data: st.DataObject, share: int, status: Any) -> None:
        account, name, running = self.pick(data)
        completion = running.reservation.covered * share // 100
        cached = data.draw(st.integers(0, running.prompt))
        usage = Usage(prompt_tokens=running.prompt, completion_tokens=completion, cached_tokens=cached)
        charge = self.settled_now(running.reservation, usage, status)
        sent = min(completion, running.reservation.covered)
        prices = running.prices
        cost = (running.prompt - cached) * prices.input_nano + cached * prices.cached_nano + sent * prices.output_nano
        cost = 0 if status == "failed" else cost
        assert charge.cost_nano == cost <= running.held
        account.balance -= cost
        del account.running[name]
        self.settled.append((running.reservation, cost))

    @precondition(lambda self: self.settled)
    @rule(data=st.data())
    def settle_again(self, data: st.DataObject) -> None:
        reservation, cost = data.draw(st.sampled_from(self.settled))
        reservation.charge = None  # as if the answer of the first commit had been lost
        usage = Usage(prompt_tokens=9, completion_tokens=0)
        assert self.settled_now(reservation, usage, "ok").cost_nano == cost

    @rule(which=st.integers(0, 1), yields=st.integers(0, 3))
    def leave_while_reserving(self, which: int, yields: int) -> None:
        caller = self.accounts[which].caller
        self.count += 1
        order = Order(request_id=f"r{self.count}", model="ernie", prompt_tokens=1, max_tokens=1, most_tokens=9)

        async def leave() -> None:
            task = asyncio.ensure_future(self.meter.reserve(caller, order))
            for _ in range(yields):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and task.exception() is None:
                await self.meter.settle(task.result(), Usage(), "cancelled")
            for _ in range(3):  # the undoing waits in the same lane
                await self.meter._store.write(lambda connection: None, lane=caller.account_id)

        self.run(leave())

    @rule(input_nano=st.integers(1, 200), output_nano=st.integers(1, 900), discount=st.integers(0, 1))
    def change_prices(self, input_nano: int, output_nano: int, discount: int) -> None:
        cached = input_nano // 2 if discount else input_nano
        self.prices = Prices(input_nano=input_nano, cached_nano=cached, output_nano=output_nano)
        self.meter.prices = self.run(self.meter.change(set_prices, "ernie", self.prices, self.time))

    @rule(which=st.integers(0, 1), nano=st.integers(1, CREDIT))
    def add_credit(self, which: int, nano: int) -> None:
        account = self.accounts[which]
        account.balance += nano
        assert self.run(self.meter.change(top_up, account.caller.account_id, nano, now=self.time)) == account.balance

    @rule(seconds=st.integers(1, 200_000))
    def wait(self, seconds: int) -> None:
        self.time += seconds

    @precondition(lambda self: any(each.running for each in self.accounts))
    @rule()
    def crash_and_restart(self) -> None:
        self.crash()
        self.meter = self.open()
        for account in self.accounts:
            account.running.clear()
        if not self.meter._store.embedded:
            # The dead process is silent for a minute, and the new one has been alive as long.
            mine = self.meter.upkeep.boot_id
            bury = update(boot).where(boot.c.id != mine).values(heartbeat=0)
            self.run(self.meter._store.write(lambda connection: connection.execute(bury)))
            self.run(self.meter.upkeep.beat())
            self.time += 60
            self.run(self.meter.upkeep.beat())

    def crash(self) -> None:
        self.meter.upkeep._keeper.cancel()
        self.run(asyncio.sleep(0))
        self.meter._store.close()

    @invariant()
    def everything_adds_up(self) -> None:
        if not hasattr(self, "accounts"):
            return
        type(self).operations += 1
        self.plain = (
            self.plain
            or create_engine(
                self.url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT"
            ).connect()
        )
        found = {row.id: tuple(row)[1:] for row in self.plain.exec_driver_sql(ADDED_UP)}
        for account in self.accounts:
            held = account.balance - account.room
            assert found[account.caller.account_id] == (account.balance, held, account.balance, held)
            assert account.room >= 0
        if type(self).operations % 50 == 0:
            assert self.run(self.meter.report(problems)) == []

    def teardown(self) -> None:
        if hasattr(self, "meter"):
            assert self.run(self.meter.report(problems)) == []
            if self.plain:
                self.plain.close()
                self.plain.engine.dispose()
            self.crash()
            self.runner.close()


ADDED_UP = """
    SELECT id, balance_nano, reserved_nano,
        CAST((SELECT coalesce(sum(delta_nano), 0) FROM ledger WHERE account_id = account.id) AS BIGINT),
        CAST((SELECT coalesce(sum(amount_nano), 0) FROM reservation WHERE account_id = account.id)
            AS BIGINT)
    FROM account"""


def run_machine(make_url: Any, examples: int, steps: int) -> int:
    machine = type("Machine", (Money,), {"make_url": staticmethod(make_url), "operations": 0})
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=checks,
        ),
    )
    operations: int = machine.operations
    return operations


def test_random_operations_add_up_in_sqlite(new_file: Callable[[], str]) -> None:
    assert run_machine(new_file, 6, 100) >= 250


def test_random_operations_add_up_in_postgresql(postgres: str, empty: Callable[[str], str]) -> None:
    assert run_machine(lambda: empty(postgres), 5, 80) >= 150
