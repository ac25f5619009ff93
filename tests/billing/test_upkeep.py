"""Holds of processes that are gone are released; those of the living never are."""

import asyncio
import logging
import sqlite3
import threading
from contextlib import contextmanager

import pytest
from sqlalchemy import func, select, update

from ernie_serve.billing import boots, idempotency
from ernie_serve.billing.meter import Order
from ernie_serve.billing.office import open_key
from ernie_serve.billing.opening import open_meter
from ernie_serve.billing.prices import Prices, Usage
from ernie_serve.billing.reports import problems
from ernie_serve.billing.schema import boot, reservation
from ernie_serve.billing.schema import idempotency as claims
from ernie_serve.billing.upkeep import Waiting
from ernie_serve.errors import StoreUnavailable


def order(request_id, **given):
    return Order(request_id=request_id, model="ernie", prompt_tokens=10, max_tokens=10, most_tokens=100, **given)


HELD = 10 * 70 + 10 * 280


def count(connection, table):
    return connection.execute(select(func.count()).select_from(table)).scalar_one()


@contextmanager
def unheard(meter, monkeypatch):
    """Within this every transaction is committed, and fails afterwards."""
    transaction = meter._store._database.transaction

    @contextmanager
    def committed(**given):
        with transaction(**given) as connection:
            yield connection
        raise sqlite3.OperationalError("away")

    with monkeypatch.context() as patch:
        patch.setattr(meter._store._database, "transaction", committed)
        yield


def silent_since(connection, boot_id, seconds):
    change = update(boot).where(boot.c.id == boot_id).values(heartbeat=boot.c.heartbeat - seconds)
    return connection.execute(change).rowcount


def test_a_dead_replica_is_found_after_a_minute_and_a_living_one_never(postgres_url, clock, caplog):
    caplog.set_level(logging.WARNING)

    async def scenario():
        dead, living, third = [await open_meter(postgres_url, "ernie", Prices(), clock.clock) for _ in range(3)]
        caller = await living.authenticate((await living.change(open_key, "k", now=1, credit_nano=10**6)).key)
        lost = await dead.reserve(caller, order("lost", idempotency_key="once"))
        running = await living.reserve(caller, order("running"))
        await third.upkeep.beat()
        assert await third.change(silent_since, dead.upkeep.boot_id, 61) == 1
        assert await third.change(silent_since, living.upkeep.boot_id, 50) == 1
        clock.move(59)
        await third.upkeep.beat()  # it has not lived for a minute itself: after an outage all may be silent
        assert third.counters.orphans_released == 0
        clock.move(1)
        await third.upkeep.beat()
        assert third.counters.orphans_released == 1
        assert await third.report(count, claims) == 0
        held = select(reservation.c.request_id)
        assert await third.report(lambda connection: list(connection.execute(held).scalars())) == ["running"]
        # It was not dead after all: what it computed is charged, as far as the balance goes.
        late = await dead.settle(lost, Usage(prompt_tokens=10, completion_tokens=10), "ok")
        assert late.cost_nano == HELD
        await living.settle(running, Usage(), "failed")
        assert await living.report(problems) == []
        for meter in (dead, living, third):
            await meter.close()

    asyncio.run(scenario())
    assert "Released 1 holds of processes that are gone" in caplog.text


def test_a_server_that_ends_well_leaves_its_holds_to_be_found_at_once(postgres_url, clock):
    async def scenario():
        leaving, staying = [await open_meter(postgres_url, "ernie", Prices(), clock.clock) for _ in range(2)]
        caller = await staying.authenticate((await staying.change(open_key, "k", now=1, credit_nano=10**6)).key)
        await leaving.reserve(caller, order("forgotten"))
        await leaving.close()
        await staying.upkeep.beat()
        clock.move(60)
        await staying.upkeep.beat()
        assert staying.counters.orphans_released == 1
        await staying.close()

    asyncio.run(scenario())


def test_a_sqlite_server_releases_at_its_start_what_the_last_one_held(small_shop):
    async def scenario():
        async with small_shop.open() as meter:
            caller = await small_shop.caller(meter)
            for index in range(3):
                await meter.reserve(caller, order(f"r{index}"))
            assert (await small_shop.account(meter, caller)).reserved_nano == 3 * HELD
        async with small_shop.open() as meter:
            assert meter.counters.orphans_released == 3
            assert (await small_shop.account(meter, caller)).reserved_nano == 0
            assert (await small_shop.account(meter, caller)).balance_nano == 10**9

    asyncio.run(scenario())


def test_boots_that_have_been_silent_for_long_are_forgotten_and_no_others(shop):
    async def scenario():
        async with shop.open() as meter:
            await meter.change(boots.beat, "silent", 100)
            await meter.change(boots.beat, "living", 200)
            await meter.change(boots.forget_old, 150)
            names = await meter.report(lambda connection: set(connection.execute(select(boot.c.id)).scalars()))
            assert "silent" not in names
            assert {"living", meter.upkeep.boot_id} <= names

    asyncio.run(scenario())


def test_a_hold_is_gone_when_its_request_ends_and_a_claim_a_day_later(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            for index in range(3):
                await meter.settle(await meter.reserve(caller, order(f"r{index}")), Usage(prompt_tokens=1), "ok")
            running = await meter.reserve(caller, order("running"))
            claimed = await meter.reserve(caller, order("claimed", idempotency_key="once"))
            await meter.settle(claimed, Usage(prompt_tokens=1), "ok")
            await meter.change(idempotency.forget_old, int(shop.clock.seconds) + 86_399)
            assert await meter.report(count, claims) == 1
            await meter.change(idempotency.forget_old, int(shop.clock.seconds) + 86_400)
            assert await meter.report(count, claims) == 0
            assert await meter.report(count, reservation) == 1
            assert await meter.report(problems) == []
            await meter.settle(running, Usage(), "ok")

    asyncio.run(scenario())


def test_a_charge_that_waits_is_written_once_by_whoever_comes_first_and_outlives_a_cancelled_attempt(small_shop):
    async def scenario():
        async with small_shop.open() as meter:
            done, gate, entered = [], threading.Event(), asyncio.Event()
            loop = asyncio.get_running_loop()

            def slow(connection):
                loop.call_soon_threadsafe(entered.set)
                gate.wait(10)
                if not done:
                    done.append("tried")
                    raise sqlite3.OperationalError("away")
                done.append("written")

            meter.upkeep.later(Waiting("a", slow, "told"))
            meter.upkeep.later(Waiting("a", lambda connection: done.append("next"), "told"))
            first = asyncio.create_task(meter.upkeep.settle_waiting())
            await entered.wait()
            first.cancel()
            gate.set()
            await asyncio.wait([first])
            others = [asyncio.create_task(meter.upkeep.settle_waiting()) for _ in range(3)]
            await asyncio.gather(*others)
            assert await meter.upkeep.settle_waiting() == 0
            assert done == ["tried", "written", "next"]
            assert meter.counters.unsettled == 0

    asyncio.run(scenario())


def test_what_a_refused_request_may_hold_is_let_go_once_and_is_no_charge_that_waits(small_shop, monkeypatch):
    async def scenario():
        async with small_shop.open() as meter:
            meter.upkeep._keeper.cancel()  # which would begin before we look
            caller = await small_shop.caller(meter)
            with unheard(meter, monkeypatch):
                for index in range(600):
                    with pytest.raises(StoreUnavailable):
                        await meter.reserve(caller, order(f"r{index}", idempotency_key=f"k{index}"))
            assert await meter.report(count, reservation) == await meter.report(count, claims) == 600
            assert meter.counters.unsettled == 0
            commits = meter._store.num_commits
            assert await meter.upkeep.settle_waiting() == 0
            assert meter._store.num_commits - commits <= 3
            assert await meter.report(count, reservation) == await meter.report(count, claims) == 0
            assert await meter.report(problems) == []

    asyncio.run(scenario())


def test_a_charge_whose_commit_was_not_heard_of_is_counted_once(small_shop, monkeypatch):
    async def scenario():
        async with small_shop.open() as meter:
            caller = await small_shop.caller(meter)
            reservation = await meter.reserve(caller, order("unheard"))
            with unheard(meter, monkeypatch):
                charge = await meter.settle(reservation, Usage(prompt_tokens=10, completion_tokens=10), "ok")
            counters = meter.counters
            assert (charge.kept, counters.settled, counters.charged_nano) == (False, 0, 0)
            for _ in range(2):
                assert await meter.upkeep.settle_waiting() == 0
                assert (counters.settled, counters.charged_nano, counters.waived_nano) == (1, HELD, 0)
            assert (await small_shop.account(meter, caller)).balance_nano == 10**9 - HELD

    asyncio.run(scenario())
