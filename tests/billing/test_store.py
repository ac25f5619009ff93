"""The store: many pieces of work in one transaction, and what happens while it cannot be written."""

import asyncio
import resource
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, select, text
from stores import MovableClock, PrivatePostgres, Shop, private_postgres

from ernie_serve.billing import accounts
from ernie_serve.billing.database import Database
from ernie_serve.billing.meter import Order
from ernie_serve.billing.opening import open_meter
from ernie_serve.billing.paid import PaidMeter
from ernie_serve.billing.prices import Prices, Usage
from ernie_serve.billing.reports import Scope, find_usage, problems
from ernie_serve.billing.schema import account
from ernie_serve.billing.store import Store, Together
from ernie_serve.errors import StoreUnavailable, Unauthorized


def order(request_id: str, **given: Any) -> Order:
    given = {"max_tokens": 50, "most_tokens": 5000} | given
    return Order(request_id=request_id, model="ernie", prompt_tokens=100, **given)


FULL = Usage(prompt_tokens=100, completion_tokens=50)


def names(connection: Connection) -> set[str]:
    return set(connection.execute(select(account.c.name)).scalars())


def test_what_waits_together_is_committed_together(url):
    store = Store(Database(url))
    try:
        gate = threading.Event()
        first = store.submit(lambda connection: gate.wait(10), lane="a")
        waiting = [store.submit(lambda connection, i=i: i, lane="a") for i in range(100)]
        gate.set()
        assert first.result(10)
        assert [each.result(10) for each in waiting] == list(range(100))
        assert store.num_commits <= 2
    finally:
        store.close()


def test_one_bad_piece_of_work_spoils_no_other(url):
    store = Store(Database(url))
    try:
        gate = threading.Event()
        store.submit(lambda connection: gate.wait(10))
        good = store.submit(lambda connection: accounts.ensure_account(connection, "good", 1))
        bad = store.submit(lambda connection: accounts.ensure_account(connection, "bad", 1) and 1 // 0)
        worse = store.submit(lambda connection: connection.execute(text("INSERT INTO account (id) VALUES ('x')")))
        last = store.submit(lambda connection: accounts.ensure_account(connection, "last", 1))
        gate.set()
        assert good.result(10) != last.result(10)
        assert isinstance(bad.exception(10), ZeroDivisionError)
        assert worse.exception(10) is not None
        assert store.submit(names).result(10) == {"good", "last"}
    finally:
        store.close()


def test_neighbours_with_the_same_work_are_done_at_once_and_alone_where_one_is_at_fault(url):
    store, groups = Store(Database(url)), []

    def all_of(connection, items):
        groups.append(list(items))
        return [100 // item for item in items]

    def hand_in(*items):
        gate = threading.Event()
        store.submit(lambda connection: gate.wait(10))
        waiting = [store.submit(Together(all_of, item)) if item is not None else store.submit(names) for item in items]
        gate.set()
        return [each.exception(10) or each.result(0) for each in waiting]

    try:
        assert hand_in(1, 2, None, 4) == [100, 50, set(), 25]
        assert groups == [[1, 2], [4]]
        groups.clear()
        assert [type(each) for each in hand_in(5, 0, 4)] == [int, ZeroDivisionError, int]
        assert groups == [[5, 0, 4], [5], [0], [4]]
    finally:
        store.close()


def test_slow_work_does_not_stop_the_event_loop(url):
    async def scenario():
        loop, gate, told = asyncio.get_running_loop(), threading.Event(), []
        for name in "ab":
            store.hand_in(lambda connection, name=name: gate.wait(10) and name, lambda *each: told.append(each))
        loop.call_later(0.05, gate.set)  # which no turn would come to
        assert await store.write(lambda connection: "c") == "c"
        assert told == [("a", None), ("b", None)]

    store = Store(Database(url))
    try:
        asyncio.run(scenario())
    finally:
        store.close()


async def hand_in(store, times):
    for _ in range(times):
        store.hand_in(names, lambda *each: None)
        await asyncio.sleep(0)


def test_a_store_that_is_locked_does_not_slow_the_event_loop(sqlite_url, monkeypatch):
    """A turn that hands something in waits for it, but not turn after turn."""
    store = Store(Database(sqlite_url))
    waits, wait = [], store._change.wait

    def counted(timeout=None):
        if threading.current_thread() is threading.main_thread():
            waits.append(timeout)
        return wait(timeout)

    monkeypatch.setattr(store._change, "wait", counted)
    other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        asyncio.run(hand_in(store, 100))
        assert 1 <= len(waits) <= 10
        assert all(seconds <= 0.002 for seconds in waits)
    finally:
        other.rollback()
        other.close()
        store.close()


def test_the_loop_loses_patience_by_degrees_and_finds_it_again(sqlite_url, monkeypatch):
    """So many turns pass between two that wait: twice as many each time it was too short, up to 64, and then none."""
    store = Store(Database(sqlite_url))
    turn, waited = 0, []

    def is_computed():
        waited.append(turn)
        return len(waited) > 8

    async def scenario():
        nonlocal turn
        while turn < 400:
            await hand_in(store, 1)
            turn += 1

    monkeypatch.setattr(store, "_is_computed", is_computed)
    try:
        asyncio.run(scenario())
    finally:
        store.close()
    between = [later - earlier - 1 for earlier, later in pairwise(waited)]
    assert between[:8] == [1, 3, 7, 15, 31, 63, 64, 64]
    assert len(between) > 50
    assert set(between[8:]) == {0}


def test_while_the_disk_is_waited_for_there_is_a_turn_to_prepare_what_is_told_then(sqlite_url, monkeypatch):
    """What waits for the commit is in the end the loop, which is not left before; nothing here hangs on a clock."""
    store = Store(Database(sqlite_url))
    commits, prepared, order = store._database.transaction, threading.Event(), []
    monkeypatch.setattr("ernie_serve.billing.store.COMPUTE_SECONDS", 10)
    monkeypatch.setattr("ernie_serve.billing.store.COMMIT_SECONDS", 10)

    @contextmanager
    def on_a_slow_disk(**given):
        with commits(**given) as connection:
            yield connection
            order.append("flushing" if prepared.wait(10) else "nobody prepared")

    async def scenario():
        store.hand_in(names, lambda *each: order.append("told"))
        await asyncio.sleep(0)
        order.append("prepared")
        prepared.set()
        await asyncio.sleep(0)
        order.append("next")

    monkeypatch.setattr(store._database, "transaction", on_a_slow_disk)
    try:
        asyncio.run(scenario())
    finally:
        store.close()
    assert order == ["prepared", "flushing", "told", "next"]


def test_who_fails_when_told_keeps_nobody_else_from_being_told(url):
    async def scenario():
        told = []
        store.hand_in(names, lambda *each: 1 / 0)
        store.hand_in(names, lambda *each: told.append(each))
        await store.write(names)
        assert len(told) == 1

    store = Store(Database(url))
    try:
        asyncio.run(scenario())
    finally:
        store.close()


def test_a_closed_store_tells_at_once_that_it_is(url):
    async def scenario():
        told = []
        store.hand_in(names, lambda *each: told.append(each))
        ((answer, error),) = told
        assert answer is None
        assert isinstance(error, StoreUnavailable)
        with pytest.raises(StoreUnavailable):
            await store.write(names)

    store = Store(Database(url))
    store.close()
    asyncio.run(scenario())


def test_a_closed_store_finishes_what_it_has_and_takes_no_more(url):
    store = Store(Database(url))
    last = [store.submit(lambda connection, i=i: accounts.ensure_account(connection, f"a{i}", 1)) for i in range(300)]
    store.close()
    assert len({each.result(0) for each in last}) == 300
    with pytest.raises(StoreUnavailable, match="shutting down"):
        store.submit(names)


def test_thousands_of_operations_by_eight_writers_lose_nothing(shop):
    each = 250 if shop.url.startswith("sqlite") else 100  # three operations a request

    async def work(meter, caller, worker):
        for index in range(each):
            reservation = await meter.reserve(caller, order(f"{worker}-{index}", max_tokens=None))
            assert await reservation.cover(1000 + index % 51)
            await meter.settle(reservation, Usage(prompt_tokens=100, completion_tokens=1000 + index % 51), "ok")

    async def scenario():
        async with shop.open() as meter:
            callers = [await shop.caller(meter, 10**9, account=f"a{worker % 4}") for worker in range(8)]
            await asyncio.gather(*(work(meter, caller, worker) for worker, caller in enumerate(callers)))
            assert meter.counters.settled == 8 * each
            spent = sum(100 * 70 + (1000 + index % 51) * 280 for index in range(each))
            for caller in callers:
                record = await shop.account(meter, caller)
                assert (record.balance_nano, record.reserved_nano) == (2 * (10**9 - spent), 0)

    asyncio.run(scenario())


def run_on(url: str, *statements: str) -> None:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


@contextmanager
def unwritable(meter: PaidMeter, url: str, how: str) -> Iterator[None]:
    """While this lasts the store cannot be written: a file that is read-only, full or elsewhere, a standby."""
    if how in ("moved", "replaced"):
        path = Path(url.removeprefix("sqlite:///"))
        aside = path.rename(path.with_suffix(".aside"))
        if how == "replaced":
            shutil.copy(aside, path)
        seen = path.read_bytes() if path.exists() else None
        yield
        assert (path.read_bytes() if path.exists() else None) == seen
        aside.rename(path)
    elif how == "full":
        wal = Path(url.removeprefix("sqlite:///") + "-wal")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (wal.stat().st_size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    elif url.startswith("sqlite"):
        with meter._store._database.transaction(durable=False, lane="") as connection:
            raw: Any = connection.connection.driver_connection
        raw.execute("PRAGMA query_only=1")
        yield
        raw.execute("PRAGMA query_only=0")
    else:
        kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ernie-serve'"
        run_on(url, "ALTER ROLE postgres SET default_transaction_read_only = on", kill)
        yield
        run_on(
            url,
            "SET default_transaction_read_only = off",
            "ALTER ROLE postgres RESET default_transaction_read_only",
            kill,
        )


def test_while_the_store_is_away_nothing_begins_and_what_runs_is_charged_later(shop, caplog):
    check_an_outage(shop, "read-only", caplog)


@pytest.mark.parametrize("how", ["full", "moved", "replaced"])
def test_a_file_may_be_away_in_other_ways(small_shop, how, caplog):
    check_an_outage(small_shop, how, caplog)


def check_an_outage(shop, how, caplog):
    """Nothing begins while the store cannot be written, and what runs is charged when it can be."""

    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            running = await meter.reserve(caller, order("running"))
            leased = await meter.reserve(caller, order("leased", max_tokens=None))
            with unwritable(meter, shop.url, how):
                with pytest.raises(StoreUnavailable) as refused:
                    await meter.reserve(caller, order("refused"))
                assert refused.value.status == 503
                charge = await meter.settle(running, FULL, "ok")
                assert (charge.cost_nano, charge.kept) == (100 * 70 + 50 * 280, False)
                assert await leased.cover(1500)
                late = await meter.settle(leased, Usage(prompt_tokens=100, completion_tokens=1500), "ok")
                assert not late.kept
                counters = meter.counters
                assert (counters.unsettled, counters.unsecured_leases, counters.settled) == (2, 1, 0)
                assert await meter.upkeep.settle_waiting() >= 2  # to release nothing writes nothing
                if how in ("moved", "replaced"):
                    with pytest.raises(StoreUnavailable):
                        await meter.report(names)
                    assert f"{shop.url.removeprefix('sqlite:///')} is not the file that was opened" in caplog.text
            await meter._store.read(names)  # a connection that was cut is found out
            assert await meter.upkeep.settle_waiting() == 0
            assert (counters.unsettled, counters.settled) == (0, 2)
            assert (counters.charged_nano, counters.waived_nano) == (charge.cost_nano + late.cost_nano, 0)
            record = await shop.account(meter, caller)
            assert (record.balance_nano, record.reserved_nano) == (10**9 - charge.cost_nano - late.cost_nano, 0)
            assert await meter.report(find_usage, "refused", Scope()) is None
            assert await meter.report(problems) == []
        assert "billing store failed" in caplog.text

    asyncio.run(scenario())


@pytest.mark.parametrize("which", ["", "-wal"])
def test_a_file_that_is_deleted_is_missed_at_once(small_shop, which):
    delete = Path(small_shop.url.removeprefix("sqlite:///") + which).unlink

    async def scenario():
        meter = await open_meter(small_shop.url, "ernie", Prices(), small_shop.clock.clock)
        try:
            caller = await small_shop.caller(meter)
            running = await meter.reserve(caller, order("running"))
            delete()
            with pytest.raises(StoreUnavailable):
                await meter.reserve(caller, order("refused"))
            with pytest.raises(StoreUnavailable):
                await meter.report(names)
            assert not (await meter.settle(running, FULL, "ok")).kept
            assert (meter.counters.store_failures, meter.counters.unsettled) == (2, 1)
        finally:
            await meter.close()

    asyncio.run(scenario())


def test_a_postgresql_that_is_down_refuses_and_is_charged_when_it_is_back(clock: MovableClock) -> None:
    async def scenario(server: PrivatePostgres) -> None:
        shop = Shop(server.url, clock)
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            running = await meter.reserve(caller, order("running"))
            await asyncio.to_thread(server.stop)
            with pytest.raises(StoreUnavailable):
                await meter.reserve(caller, order("refused"))
            charge = await meter.settle(running, FULL, "ok")
            assert not charge.kept
            clock.move(5)
            with pytest.raises(StoreUnavailable):
                await meter.authenticate(f"sk-{caller.key_id}-{'x' * 43}")
            assert await meter.upkeep.settle_waiting() == 2  # the charge, and the hold that may have been made
            await asyncio.to_thread(server.start)
            assert await meter.upkeep.settle_waiting() == 0
            record = await shop.account(meter, caller)
            assert (record.balance_nano, record.reserved_nano) == (10**9 - charge.cost_nano, 0)
            await meter.settle(await meter.reserve(caller, order("next")), FULL, "ok")

    with private_postgres() as server:
        asyncio.run(scenario(server))


def test_what_can_never_be_written_is_logged_with_its_numbers(small_shop, caplog):
    async def scenario():
        meter = await open_meter(small_shop.url, "ernie", Prices(), small_shop.clock.clock)
        reservation = await meter.reserve(await small_shop.caller(meter), order("lost"))
        with unwritable(meter, small_shop.url, "read-only"):
            await meter.settle(reservation, FULL, "ok")
            await meter.close()
            told = [record.getMessage() for record in caplog.records if record.levelname == "CRITICAL"]
            assert len(told) == 1
            assert "lost" in told[0]
            assert "0.000021 USD" in told[0]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        asyncio.run(scenario())


def test_nobody_is_let_in_on_an_old_belief(shop, monkeypatch):
    async def scenario():
        async with shop.open() as meter:
            new = await shop.new_key(meter)
            await meter.authenticate(new.key)

            def broken(do):
                raise StoreUnavailable("away")

            with monkeypatch.context() as patch:
                patch.setattr(meter._store, "_read", broken)
                await meter.authenticate(new.key)
                shop.clock.move(5)
                for key in (new.key, new.key.replace(new.key_id, "0" * 16)):
                    with pytest.raises(StoreUnavailable):
                        await meter.authenticate(key)
                with pytest.raises(Unauthorized):
                    await meter.authenticate("no key")
            await meter.authenticate(new.key)

    asyncio.run(scenario())


def test_a_key_is_read_once_for_all_who_ask_meanwhile_and_anew_after_a_change(small_shop, monkeypatch):
    async def scenario():
        async with small_shop.open() as meter:
            new = await small_shop.new_key(meter)
            read, reads = meter._store.read, []

            async def counted(do):
                reads.append(do)
                return await read(do)

            monkeypatch.setattr(meter._store, "read", counted)
            callers = await asyncio.gather(*(meter.authenticate(new.key) for _ in range(50)))
            assert len(reads) == 1
            assert {caller.key_id for caller in callers} == {new.key_id}
            small_shop.clock.move(5)
            begun = asyncio.ensure_future(meter.authenticate(new.key))
            await asyncio.sleep(0)
            await meter.change(accounts.disable_key, new.key_id, now=1)
            await asyncio.wait([begun])
            with pytest.raises(Unauthorized):
                await meter.authenticate(new.key)

    asyncio.run(scenario())


def test_a_lock_that_lasts_is_an_answer_within_seconds(postgres_url, clock, request):
    async def scenario():
        meter = await open_meter(postgres_url, "ernie", Prices(), clock.clock)
        new = await meter.change(accounts_with_key)
        caller = await meter.authenticate(new.key)
        engine = create_engine(postgres_url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            connection.exec_driver_sql("SELECT 1 FROM account FOR UPDATE")
            with pytest.raises(StoreUnavailable):
                await meter.reserve(caller, order("r"))
        engine.dispose()
        assert await meter.upkeep.settle_waiting() == 0
        await meter.settle(await meter.reserve(caller, order("s")), FULL, "ok")
        await meter.close()

    def accounts_with_key(connection: Connection) -> Any:
        from ernie_serve.billing.office import open_key

        return open_key(connection, "k", now=1, credit_nano=10**9)

    asyncio.run(scenario())
