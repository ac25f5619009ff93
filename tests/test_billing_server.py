"""Billing as an operator has it: servers and commands, each a process of its own, on one store."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

MODEL = "tiny"
DEADLINE_SECONDS = 120.0
BODY = {"model": MODEL, "prompt": [10, 11, 12, 13], "max_tokens": 2, "ignore_eos": True, "temperature": 0}
COST = 4 * 70 + 2 * 280


@contextlib.contextmanager
def serving(folder: Path, store: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """`ernie-serve serve --billing`: its address, once it is known, and its process."""
    small = ["--port", "0", "--kv-cache-memory-bytes", "16MiB", "--threads", "1", "--dtype", "float32"]
    command = [sys.executable, "-m", "ernie_serve", "serve", str(folder), "--served-model-name", MODEL, *small]
    process = subprocess.Popen(
        [*command, "--billing", "--database-url", store],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"URL\s+(http://\S+)", line):
                yield found[1], process
                return
        raise AssertionError("".join(said))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def command(store: str, *arguments: str) -> str:
    """What a command prints."""
    environ = os.environ | {"ERNIE_SERVE_DATABASE_URL": store}
    done = subprocess.run(
        [sys.executable, "-m", "ernie_serve", *arguments], capture_output=True, text=True, env=environ, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def charged(store: str) -> list[Any]:
    return [json.loads(line) for line in command(store, "usage", "--json").splitlines()]


def test_two_servers_on_one_postgresql_answer_exactly_seventeen_of_two_hundred(
    tiny_checkpoint: Path, postgres_url: str
) -> None:
    credit = f"{17 * COST / 10**9:.9f}"
    key = command(postgres_url, "keys", "create", "k", "--account", "acme", "--credit", credit).splitlines()[-1]

    async def ask_both(urls: list[str]) -> list[int]:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(
            headers={"authorization": f"Bearer {key}"}, timeout=DEADLINE_SECONDS, limits=limits
        ) as client:

            async def ask(index: int) -> int:
                answer = await client.post(f"{urls[index % 2]}/completions", json=BODY)
                return answer.status_code

            return list(await asyncio.gather(*(ask(index) for index in range(200))))

    with serving(tiny_checkpoint, postgres_url) as (a, _), serving(tiny_checkpoint, postgres_url) as (b, _):
        answers = asyncio.run(ask_both([a, b]))
    assert {status: answers.count(status) for status in set(answers)} == {200: 17, 402: 183}
    rows = charged(postgres_url)
    assert [row["cost_nano"] for row in rows] == [COST] * 17
    assert re.search(r"k +acme +0 +default +active", command(postgres_url, "keys", "list"))


def test_a_killed_server_leaves_no_hold_and_a_disabled_key_ends_while_it_serves(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    store = f"sqlite:///{tmp_path / 'billing.db'}"
    key = command(store, "keys", "create", "k", "--credit", "1").splitlines()[-1]
    headers = {"authorization": f"Bearer {key}"}
    with serving(tiny_checkpoint, store) as (url, process):
        whole = httpx.post(f"{url}/completions", json=BODY, headers=headers, timeout=DEADLINE_SECONDS).json()
        assert whole["usage"]["cost_nano_usd"] == COST
        body = BODY | {"stream": True, "max_tokens": 4000}
        with httpx.stream("POST", f"{url}/completions", json=body, headers=headers, timeout=DEADLINE_SECONDS) as stream:
            assert next(stream.iter_lines()).startswith("data: ")
            process.send_signal(signal.SIGKILL)
            process.wait()
    (row,) = charged(store)
    assert (row["request_id"], row["cost_nano"]) == (whole["id"], COST)
    with serving(tiny_checkpoint, store) as (url, _):
        told = httpx.get(f"{url}/key", headers=headers, timeout=DEADLINE_SECONDS).json()["data"]
        assert told["account"]["reserved_nano_usd"] == 0
        assert told["account"]["balance_nano_usd"] == 10**9 - COST
        command(store, "keys", "disable", "k")
        deadline = time.monotonic() + DEADLINE_SECONDS
        while httpx.get(f"{url}/key", headers=headers, timeout=DEADLINE_SECONDS).status_code != 401:
            assert time.monotonic() < deadline
            time.sleep(0.2)
