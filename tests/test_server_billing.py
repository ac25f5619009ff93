"""Servers that charge, as users and operators have them: processes of their own, keys from the store, `kill -9`."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from served import DEADLINE_SECONDS, MODEL, running

from ernie_serve.billing.database import Database
from ernie_serve.billing.office import open_key
from ernie_serve.billing.opening import open_meter
from ernie_serve.billing.prices import Prices
from ernie_serve.billing.reports import Scope, UsageRow, list_usage, problems


def test_a_server_that_is_killed_has_charged_what_it_answered_and_holds_nothing(
    tiny_checkpoint: Path, sqlite_url: str
) -> None:
    database = Database(sqlite_url)
    with database.transaction(durable=True, lane="") as connection:
        key = open_key(connection, "laptop", now=1, credit_nano=10**9).key
    database.close()
    with running(tiny_checkpoint, "--billing", ERNIE_SERVE_DATABASE_URL=sqlite_url) as server:
        told = "".join(server.lines)
        assert re.search(r"Billing\s+on, 0.07 USD in and 0.28 USD out a million tokens; SQLite", told)
        assert sqlite_url.removeprefix("sqlite:///") in re.sub(r"[│\s]", "", told)
        body = {"model": MODEL, "prompt": "0123", "max_tokens": 8, "ignore_eos": True}
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=DEADLINE_SECONDS) as client:
            refused = httpx.post(f"{server.url}/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            answer = client.post("/completions", json=body).json()
            usage = answer["usage"]
            assert usage["cost_nano_usd"] == 70 * usage["prompt_tokens"] + 280 * 8
            with client.stream("POST", "/completions", json=body | {"stream": True, "max_tokens": 12_000}) as response:
                lines = response.iter_lines()  # kept: an iterator that is dropped closes its connection
                first = next(lines)
                assert (response.status_code, first[:7]) == (200, "data: {"), first
                server.process.kill()
                code, rest = server.wait()  # before the stream is left: a server that still lives charges for leaving
        assert code == -signal.SIGKILL
        told += rest
    assert key not in told
    released, wrong, rows = asyncio.run(reopened(sqlite_url))
    assert (released, wrong) == (1, [])
    assert [(row.completion, row.cost_nano) for row in rows] == [(8, usage["cost_nano_usd"])]
    (charge,) = charged(sqlite_url)
    assert (charge["request_id"], charge["cost_nano"]) == (answer["id"], usage["cost_nano_usd"])


async def reopened(url: str) -> tuple[int, list[str], list[UsageRow]]:
    """What a server that starts again finds: the holds it releases, what does not add up, what was charged."""
    meter = await open_meter(url, "tiny", Prices())
    try:
        rows = await meter.report(list_usage, Scope(), start=0, end=2**40)
        return meter.counters.orphans_released, await meter.report(problems), rows
    finally:
        await meter.close()


BODY = {"model": MODEL, "prompt": [10, 11, 12, 13], "max_tokens": 2, "ignore_eos": True, "temperature": 0}
COST = 4 * 70 + 2 * 280


def run(store: str, *arguments: str) -> str:
    """What a command prints."""
    environ = os.environ | {"ERNIE_SERVE_DATABASE_URL": store}
    done = subprocess.run(
        [sys.executable, "-m", "ernie_serve", *arguments], capture_output=True, text=True, env=environ, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def charged(store: str) -> list[Any]:
    return [json.loads(line) for line in run(store, "usage", "--json").splitlines()]


def test_two_servers_on_one_postgresql_answer_exactly_seventeen_of_two_hundred_until_a_command_disables_the_key(
    tiny_checkpoint: Path, postgres_url: str
) -> None:
    credit = f"{17 * COST / 10**9:.9f}"
    key = run(postgres_url, "keys", "create", "k", "--account", "acme", "--credit", credit).splitlines()[-1]

    async def ask_both(urls: list[str]) -> list[int]:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(
            headers={"authorization": f"Bearer {key}"}, timeout=DEADLINE_SECONDS, limits=limits
        ) as client:

            async def ask(index: int) -> int:
                answer = await client.post(f"{urls[index % 2]}/completions", json=BODY)
                return answer.status_code

            return list(await asyncio.gather(*(ask(index) for index in range(200))))

    charging = ("--billing", "--database-url", postgres_url)
    with running(tiny_checkpoint, *charging) as a, running(tiny_checkpoint, *charging) as b:
        answers = asyncio.run(ask_both([a.url, b.url]))
        run(postgres_url, "keys", "disable", "k")
        for url in (a.url, b.url):
            deadline = time.monotonic() + DEADLINE_SECONDS
            bearer = {"authorization": f"Bearer {key}"}
            while httpx.get(f"{url}/key", headers=bearer, timeout=DEADLINE_SECONDS).status_code != 401:
                assert time.monotonic() < deadline
                time.sleep(0.2)
    assert {status: answers.count(status) for status in set(answers)} == {200: 17, 402: 183}
    rows = charged(postgres_url)
    assert [row["cost_nano"] for row in rows] == [COST] * 17
    assert re.search(r"k +acme +0 +default +disabled", run(postgres_url, "keys", "list"))
