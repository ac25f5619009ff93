"""`kill -9` of a server while its streams run: no hold is left, and nobody pays for what was not made."""

import asyncio
import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from ernie_serve.billing.database import Database
from ernie_serve.billing.office import open_key
from ernie_serve.billing.opening import open_meter
from ernie_serve.billing.prices import Prices
from ernie_serve.billing.reports import problems

TESTS = Path(__file__).parents[1]
ROUNDS = 4
STREAMS = 12

# For each line it reads it forks a server, and says its process id and port, and then when it is gone: its clients may
# hear of that before its lock is let go.
NURSERY = """
import asyncio, os, socket, sys
import uvicorn
from conftest import ScriptedEngine, services_over
from ernie_serve.api.app import create_app
from ernie_serve.billing.opening import open_meter
from ernie_serve.billing.prices import Prices

async def serve(url, listener):
    meter = await open_meter(url, "baidu/ernie", Prices())
    engine = ScriptedEngine(reply="x" * 3000, step=2, turns=20)
    app = create_app(services_over(engine, meter=meter, max_model_len=10_000))
    await uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off")).serve([listener])

for line in sys.stdin:
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(serve(sys.argv[1], listener))
        finally:
            os._exit(1)
    print(child, listener.getsockname()[1], flush=True)
    listener.close()
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


class Stream:
    """What one client has seen of its stream."""

    def __init__(self) -> None:
        self.id = ""
        self.num_tokens = 0
        self.ended = False

    async def read(self, client: httpx.AsyncClient, max_tokens: int, leave_after: int) -> None:
        body = {"model": "ernie", "prompt": "Hi", "max_tokens": max_tokens, "stream": True}
        with contextlib.suppress(httpx.HTTPError):
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line[6:])
                        self.id = chunk["id"]
                        self.num_tokens += len(chunk["choices"][0]["text"])
                    self.ended |= line == "data: [DONE]"
                    if self.num_tokens >= leave_after:
                        return


def test_a_server_killed_among_its_streams_leaves_no_hold_and_charges_only_what_was_made(sqlite_url: str) -> None:
    chance = random.Random(45)
    database = Database(sqlite_url)
    with database.transaction(durable=True, lane="") as connection:
        key = open_key(connection, "k", now=1, credit_nano=10**12).key
    database.close()
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS / "api"), str(TESTS)])}
    command = [sys.executable, "-c", NURSERY, sqlite_url]
    nursery = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
    plain = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))
    held, streams = 0, list[Stream]()
    try:
        for _ in range(ROUNDS):
            assert nursery.stdin
            assert nursery.stdout
            nursery.stdin.write("go\n")
            nursery.stdin.flush()
            child, port = map(int, nursery.stdout.readline().split())
            streams += asyncio.run(kill_among_streams(child, port, key, chance))
            assert nursery.stdout.readline() == "gone\n"
            (left,) = plain.execute("SELECT count(*) FROM reservation").fetchone()
            held += left
            assert restarted(sqlite_url) == (left, [])
    finally:
        assert nursery.stdin
        assert nursery.stdout
        nursery.stdin.close()
        nursery.wait(30)
        nursery.stdout.close()
    rows = {
        row[0]: row[1:] for row in plain.execute("SELECT request_id, prompt, completion, cost_nano FROM usage_event")
    }
    (balance, reserved) = plain.execute("SELECT balance_nano, reserved_nano FROM account").fetchone()
    plain.close()
    assert held > 0, "the kills found no stream running"
    assert (balance, reserved) == (10**12 - sum(cost for _, _, cost in rows.values()), 0)
    seen = {stream.id: stream for stream in streams if stream.id}
    for request_id, (prompt, completion, cost) in rows.items():
        assert cost == 70 * prompt + 280 * completion
        stream = seen.get(request_id)
        assert completion >= (stream.num_tokens if stream else 0)
    for stream in seen.values():
        if stream.ended:
            assert rows[stream.id][1] == stream.num_tokens, "an answer was whole before it was charged"
        elif stream.id not in rows:
            assert stream.num_tokens < 3000
    assert any(stream.ended for stream in seen.values())


async def kill_among_streams(child: int, port: int, key: str, chance: random.Random) -> list[Stream]:
    """Streams of which some end, some are left and some run when the server is killed."""
    headers = {"authorization": f"Bearer {key}"}
    streams = [Stream() for _ in range(STREAMS)]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
        await Stream().read(client, 2, 10_000)  # it answers
        reading = [
            asyncio.ensure_future(stream.read(client, chance.choice([20, 3000]), chance.choice([40, 10_000])))
            for stream in streams
        ]
        while sum(task.done() for task in reading) < STREAMS // 3:  # noqa: ASYNC110  # a count has no event
            await asyncio.sleep(0.01)
        await asyncio.sleep(chance.random() * 0.05)
        os.kill(child, 9)
        await asyncio.gather(*reading)
    return streams


def restarted(url: str) -> tuple[int, list[str]]:
    """Open the store again: how many holds that released, and what does not add up then."""

    async def look() -> tuple[int, list[str]]:
        meter: Any = await open_meter(url, "baidu/ernie", Prices())
        wrong = await meter.report(problems)
        await meter.close()
        return meter.counters.orphans_released, wrong

    return asyncio.run(look())
