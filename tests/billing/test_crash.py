"""`kill -9` while requests are reserved and settled: whatever was promised is there, and nothing else."""

import asyncio
import random
import sqlite3
import subprocess
import sys

from sqlalchemy import Connection
from stores import MovableClock

from ernie_serve.billing.database import Database
from ernie_serve.billing.office import open_key, top_up
from ernie_serve.billing.opening import open_meter
from ernie_serve.billing.paid import PaidMeter
from ernie_serve.billing.prices import Prices
from ernie_serve.billing.reports import problems

ROUNDS = 50
POSTGRES_ROUNDS = 10

# Reads lines of two numbers: after so many settlements, and so many microseconds, a forked child is killed.
# The child says `ID COST` only when `settle` has returned. One request of each runs until the kill.
NURSERY = """
import asyncio, os, select, signal, sys, time
import alembic.migration, alembic.operations, alembic.script  # or each child would, when it opens the store
from ernie_serve.billing.opening import open_meter
from ernie_serve.billing.meter import Order
from ernie_serve.billing.prices import Prices, Usage

url, key = sys.argv[1:]

async def work(name, say):
    meter = await open_meter(url, "ernie", Prices())
    caller = await meter.authenticate(key)
    await meter.reserve(caller, Order(request_id=f"{name}-runs", model="ernie", prompt_tokens=10, most_tokens=2000))
    async def requests(worker):
        for index in range(10_000):
            order = Order(request_id=f"{name}-{worker}-{index}", model="ernie", prompt_tokens=10, most_tokens=2000)
            reservation = await meter.reserve(caller, order)
            await reservation.cover(900 if index % 3 == 0 else 1)
            charge = await meter.settle(reservation, Usage(prompt_tokens=10, completion_tokens=index % 50), "ok")
            os.write(say, f"{order.request_id} {charge.cost_nano}\\n".encode())
    await asyncio.gather(*(requests(worker) for worker in range(8)))

for name, line in enumerate(sys.stdin):
    lines, micros = map(int, line.split())
    heard, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(work(f"{os.getpid()}-{name}", say))
        finally:
            os._exit(1)
    os.close(say)
    told = b""
    while told.count(b"\\n") < lines:
        more = os.read(heard, 65536)
        assert more, "the child ended by itself"
        told += more
    select.select([], [], [], micros / 1e6)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(heard, 65536):
        told += more
    os.close(heard)
    print(told.decode(errors="replace").replace("\\n", ";"), flush=True)
"""


class Nursery:
    """Servers that are started one after the other and killed while they work."""

    def __init__(self, url: str, key: str) -> None:
        self._chance = random.Random(45)
        self.num_amid = 0  # of the killed, those that had charged something, so that a request surely ran
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, url, key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def kill_one(self) -> dict[str, int]:
        """Kill a server at a random moment; what it had charged by then, by request."""
        assert self._process.stdin
        assert self._process.stdout
        settlements = self._chance.randrange(12)
        self.num_amid += settlements > 0
        self._process.stdin.write(f"{settlements} {self._chance.randrange(30_000)}\n")
        self._process.stdin.flush()
        told = [line.split(" ") for line in self._process.stdout.readline().strip().split(";") if line]
        return {name: int(cost) for name, cost in told}

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)
        assert self._process.returncode == 0


def key_with_credit(url: str, credit_nano: int) -> str:
    """A key of a new account."""
    database = Database(url)
    with database.transaction(durable=True, lane="") as connection:
        key = open_key(connection, "k", now=1, credit_nano=credit_nano).key
    database.close()
    return key


def test_fifty_kills_lose_no_charge_and_leave_no_hold(sqlite_url: str) -> None:
    credit = 10**12
    plain = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))
    promised: dict[str, int] = {}
    held = 0
    with Nursery(sqlite_url, key_with_credit(sqlite_url, credit)) as nursery:
        for _ in range(ROUNDS):
            promised |= nursery.kill_one()
            (left,) = plain.execute("SELECT count(*) FROM reservation").fetchone()
            held += left
            assert restart(sqlite_url) == (left, [])
            rows = dict(plain.execute("SELECT request_id, cost_nano FROM usage_event").fetchall())
            assert {name: rows.get(name) for name in promised} == promised
            assert plain.execute(WRONG).fetchone() == (0,)
            (balance, reserved) = plain.execute("SELECT balance_nano, reserved_nano FROM account").fetchone()
            assert (balance, reserved) == (credit - sum(rows.values()), 0)
    plain.close()
    assert held >= nursery.num_amid > ROUNDS / 2, "the kills found no request running"
    assert len(promised) > ROUNDS


WRONG = "SELECT count(*) FROM usage_event WHERE cost_nano <> prompt * 70 + completion * 280"


def test_kills_on_postgresql_lose_no_charge_and_another_server_lets_the_holds_go(
    postgres_url: str, clock: MovableClock
) -> None:
    credit = 10**12
    promised: dict[str, int] = {}

    def look(connection: Connection) -> tuple[dict[str, int], int, int, int]:
        rows = connection.exec_driver_sql("SELECT request_id, cost_nano FROM usage_event").all()
        left = connection.exec_driver_sql("SELECT count(*) FROM reservation").scalar_one()
        assert connection.exec_driver_sql(WRONG).scalar_one() == 0
        balance, reserved = connection.exec_driver_sql("SELECT balance_nano, reserved_nano FROM account").one()
        return {row[0]: row[1] for row in rows}, left, balance, reserved

    def fall_silent(connection: Connection) -> None:
        connection.exec_driver_sql("UPDATE boot SET heartbeat = heartbeat - 61")

    async def scenario() -> None:
        living = await open_meter(postgres_url, "ernie", Prices(), clock.clock)
        await living.upkeep.beat()
        clock.move(60)
        released = 0
        for _ in range(POSTGRES_ROUNDS):
            promised.update(await asyncio.to_thread(nursery.kill_one))
            assert await living.report(problems) == []
            await settled_down(living)
            rows, left, balance, reserved = await living.report(look)
            assert {name: rows.get(name) for name in promised} == promised
            assert balance == credit - sum(rows.values())
            assert (reserved > 0) == (left > 0)
            await living.change(fall_silent)
            await living.upkeep.beat()
            released += left
            assert living.counters.orphans_released == released
            _, left, _, reserved = await living.report(look)
            assert (left, reserved) == (0, 0)
            assert await living.report(problems) == []
        assert released >= nursery.num_amid > POSTGRES_ROUNDS / 2, "the kills found no request running"
        await living.close()

    with Nursery(postgres_url, key_with_credit(postgres_url, credit)) as nursery:
        asyncio.run(scenario())
    assert len(promised) > POSTGRES_ROUNDS


async def settled_down(meter: PaidMeter) -> None:
    """Wait until PostgreSQL has noticed that the killed server's sessions are gone, and undone what they began."""
    others = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ernie-serve' AND xact_start IS NOT NULL"

    def count(connection: Connection) -> int:
        number: int = connection.exec_driver_sql(others).scalar_one()
        return number - 1  # its own

    while await meter.report(count):  # noqa: ASYNC110  # PostgreSQL tells nobody
        await asyncio.sleep(0.01)


def restart(url: str) -> tuple[int, list[str]]:
    """Start a server's billing anew: how many holds it released, and what does not add up then."""

    async def look() -> tuple[int, list[str]]:
        meter = await open_meter(url, "ernie", Prices())
        wrong = await meter.report(problems)
        await meter.close()
        return meter.counters.orphans_released, wrong

    return asyncio.run(look())


SERVER = """
import asyncio, sys
from ernie_serve.billing.opening import open_meter
from ernie_serve.billing.meter import Order
from ernie_serve.billing.prices import Prices, Usage
from ernie_serve.errors import PaymentRequired

url, key, name = sys.argv[1:]

async def attempt(meter, caller, index):
    order = Order(request_id=f"{name}-{index}", model="ernie", prompt_tokens=100, max_tokens=50, most_tokens=1000)
    try:
        reservation = await meter.reserve(caller, order)
    except PaymentRequired:
        return 402
    await meter.settle(reservation, Usage(prompt_tokens=100, completion_tokens=50), "ok")
    return 200

async def main():
    meter = await open_meter(url, "ernie", Prices())
    caller = await meter.authenticate(key)
    print("ready", flush=True)
    sys.stdin.readline()
    answers = await asyncio.gather(*(attempt(meter, caller, index) for index in range(100)))
    print(answers.count(200), answers.count(402), flush=True)
    await meter.close()

asyncio.run(main())
"""


def test_two_servers_on_one_postgresql_pay_for_exactly_seventeen(postgres_url: str) -> None:
    cost = 100 * 70 + 50 * 280
    database = Database(postgres_url)
    with database.transaction(durable=True, lane="") as connection:
        new = open_key(connection, "k", now=1, credit_nano=17 * cost)
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", SERVER, postgres_url, new.key, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    ready = [server.stdout.readline() for server in servers if server.stdout]
    assert ready == ["ready\n"] * 2
    for server in servers:
        assert server.stdin
        server.stdin.write("go\n")
        server.stdin.flush()
    answers = [[int(each) for each in server.communicate(timeout=60)[0].split()] for server in servers]
    assert [sum(each) for each in zip(*answers, strict=True)] == [17, 183]
    with database.transaction(durable=False, lane="") as connection:
        assert problems(connection) == []
        assert top_up(connection, new.account_id, 0, now=1) == 0
    database.close()
