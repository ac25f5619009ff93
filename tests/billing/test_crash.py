"""`kill -9` while requests are reserved and settled: whatever was promised is there, and nothing else."""

import asyncio
import random
import sqlite3
import subprocess
import sys

from ernie_serve.billing.database import Database
from ernie_serve.billing.office import open_key, top_up
from ernie_serve.billing.opening import open_meter
from ernie_serve.billing.prices import Prices
from ernie_serve.billing.reports import problems

ROUNDS = 50

# Reads lines of two numbers: after so many settlements, and so many microseconds, a forked child is killed.
# The child says `ID COST` only when `settle` has returned.
NURSERY = """
import asyncio, os, select, signal, sys, time
from ernie_serve.billing.opening import open_meter
from ernie_serve.billing.meter import Order
from ernie_serve.billing.prices import Prices, Usage

url, key = sys.argv[1:]

async def work(name, say):
    meter = await open_meter(url, "ernie", Prices())
    caller = await meter.authenticate(key)
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


def test_fifty_kills_lose_no_charge_and_leave_no_hold(sqlite_url: str) -> None:
    chance = random.Random(45)
    credit = 10**12
    database = Database(sqlite_url)
    with database.transaction(durable=True, lane="") as connection:
        key = open_key(connection, "k", now=1, credit_nano=credit).key
    database.close()
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY, sqlite_url, key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert nursery.stdin
    assert nursery.stdout
    plain = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))
    promised: dict[str, int] = {}
    held = 0
    try:
        for _ in range(ROUNDS):
            nursery.stdin.write(f"{chance.randrange(12)} {chance.randrange(30_000)}\n")
            nursery.stdin.flush()
            told = [line.split(" ") for line in nursery.stdout.readline().strip().split(";") if line]
            promised |= {name: int(cost) for name, cost in told}
            (left,) = plain.execute("SELECT count(*) FROM reservation WHERE state = 'open'").fetchone()
            held += left
            assert restart(sqlite_url) == (left, [])
            rows = dict(plain.execute("SELECT request_id, cost_nano FROM usage_event").fetchall())
            assert {name: rows.get(name) for name in promised} == promised
            wrong = "SELECT count(*) FROM usage_event WHERE cost_nano <> prompt * 70 + completion * 280"
            assert plain.execute(wrong).fetchone() == (0,)
            (balance, reserved) = plain.execute("SELECT balance_nano, reserved_nano FROM account").fetchone()
            assert (balance, reserved) == (credit - sum(rows.values()), 0)
    finally:
        nursery.stdin.close()
        nursery.wait(30)
        nursery.stdout.close()
        plain.close()
    assert nursery.returncode == 0
    assert held > ROUNDS, "the kills found no request running"
    assert len(promised) > ROUNDS


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
