"""A server that charges, as a user has it: a process of its own, a key from the store, `kill -9`."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx

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
    small = ["--port", "0", "--kv-cache-memory-bytes", "16MiB", "--threads", "1", "--dtype", "float32"]
    command = [sys.executable, "-m", "ernie_serve", "serve", str(tiny_checkpoint), "--served-model-name", "tiny"]
    process = subprocess.Popen(
        [*command, *small, "--billing"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200", "ERNIE_SERVE_DATABASE_URL": sqlite_url},
    )
    told = ""
    try:
        assert process.stderr is not None
        while not (found := re.search(r"URL\s+(http://\S+)", told)):
            line = process.stderr.readline()
            assert line, told
            told += line
        assert re.search(r"Billing\s+on, 0.07 USD in and 0.28 USD out a million tokens; SQLite", told)
        body = {"model": "tiny", "prompt": "0123", "max_tokens": 8, "ignore_eos": True}
        with httpx.Client(base_url=found[1], headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
            refused = httpx.post(f"{found[1]}/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            usage = client.post("/completions", json=body).json()["usage"]
            assert usage["cost_nano_usd"] == 70 * usage["prompt_tokens"] + 280 * 8
            with client.stream("POST", "/completions", json=body | {"stream": True, "max_tokens": 12_000}) as response:
                first = next(response.iter_lines())
                assert (response.status_code, first[:7]) == (200, "data: {"), first
                process.kill()
        told += process.stderr.read()
        assert process.wait(30) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
    assert key not in told
    released, wrong, rows = asyncio.run(reopened(sqlite_url))
    assert (released, wrong) == (1, [])
    assert [(row.completion, row.cost_nano) for row in rows] == [(8, usage["cost_nano_usd"])]


async def reopened(url: str) -> tuple[int, list[str], list[UsageRow]]:
    """What a server that starts again finds: the holds it releases, what does not add up, what was charged."""
    meter = await open_meter(url, "tiny", Prices())
    try:
        rows = await meter.report(list_usage, Scope(), start=0, end=2**40)
        return meter.counters.orphans_released, await meter.report(problems), rows
    finally:
        await meter.close()
