"""What billing adds to a request over HTTP, beside what the disk itself takes to flush.

Serves a scripted engine, which makes a token a step for everybody, by uvicorn in a process of its own, and asks it from
here with many streams at once; with billing and without in turns. Nothing of a model is measured.

    .venv/bin/python scripts/bench_billing.py [--folder FOLDER] [--streams 64] [--requests 512] [--rounds 5]
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx

STEP_SECONDS = 0.050
TOKENS = range(8, 25)
"""Answers have so many tokens in turn, so that of 64 in flight about four end with a step."""


async def serve(url: str) -> None:
    """A server on a free port, which it prints, with a key of a rich account where `url` names a store."""
    import uvicorn

    from ernie_serve.api.app import create_app
    from ernie_serve.api.services import Services
    from ernie_serve.billing.free import FreeMeter
    from ernie_serve.billing.meter import Meter
    from ernie_serve.billing.office import open_key
    from ernie_serve.billing.opening import open_meter
    from ernie_serve.billing.prices import Prices
    from ernie_serve.launch import BUNDLED
    from ernie_serve.messages import EngineOutput, EngineRequest, EngineStats
    from ernie_serve.text.generation import GenerationDefaults
    from ernie_serve.text.tokenizer import Tokenizer

    class SteppingEngine:
        """Makes a token every 50 ms for each request, all at the same time, like an engine with its steps."""

        state, progress, failure, info, stats = "ready", (1.0, "ready"), "", None, EngineStats()

        async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
            loop = asyncio.get_running_loop()
            for made in range(1, request.sampling.max_tokens + 1):
                await asyncio.sleep(STEP_SECONDS - loop.time() % STEP_SECONDS)
                reason: Any = "length" if made == request.sampling.max_tokens else None
                yield EngineOutput(request_id=request.request_id, token_ids=[5], finish_reason=reason)

        def abort(self, request_id: str) -> None: ...

        async def close(self) -> None: ...

    meter: Meter = FreeMeter()
    key = "none"
    if url:
        meter = await open_meter(url, "bench", Prices())
        key = (await meter.change(open_key, "bench", now=1, credit_nano=10**15)).key
    folder = Path(sys.modules["ernie_serve"].__path__[0]) / "bundled" / BUNDLED
    services = Services(
        engine=SteppingEngine(),  # type: ignore[arg-type]
        tokenizer=Tokenizer.from_folder(folder),
        template=None,
        defaults=GenerationDefaults(),
        model_names=("bench",),
        max_model_len=4096,
        meter=meter,
    )
    quiet: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off", "timeout_keep_alive": 75}
    config = uvicorn.Config(create_app(services), port=0, **quiet)
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(server.serve())
    while not server.started:  # noqa: ASYNC110  # uvicorn has no event for it
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], key, flush=True)
    await serving
    await meter.close()


Times = tuple[float, float, float, float]


async def ask(client: httpx.AsyncClient, tokens: int, *, stream: bool) -> Times:
    """Seconds to the first token, to the last, to the end, and from the engine's last step to the end.

    The last is what a median tells best: it has neither the answer's length nor the wait for the next step in it.
    """
    body = {"model": "bench", "prompt": [7] * 64, "max_tokens": tokens, "stream": stream}
    began = time.perf_counter()
    arrivals = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for _ in response.aiter_raw():
            arrivals.append(time.perf_counter() - began)
    late = time.monotonic() % STEP_SECONDS  # the engine steps by the same clock
    return arrivals[0], arrivals[max(0, len(arrivals) - 2)], arrivals[-1], late


async def load(port: int, key: str, streams: int, requests: int, *, stream: bool) -> list[Times]:
    """The times of so many requests, so many at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"authorization": f"Bearer {key}"}
    gate = asyncio.Semaphore(streams)
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=60) as client:

        async def one(index: int) -> Times:
            async with gate:
                return await ask(client, TOKENS[index % len(TOKENS)], stream=stream)

        return await asyncio.gather(*(one(index) for index in range(requests)))


def flush_ms(folder: Path, count: int = 200) -> list[float]:
    """What writing 4 KiB and waiting for the disk takes, in milliseconds."""
    times = []
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(count):
            os.write(file.fileno(), b"x" * 4096)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - began) * 1e3)
    return times


def cpu_seconds(process_id: int) -> tuple[float, float]:
    """What a process and, of that, its main thread, which runs the event loop, have computed."""
    tick = os.sysconf("SC_CLK_TCK")

    def used(path: str) -> float:
        fields = Path(path).read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / tick

    return used(f"/proc/{process_id}/stat"), used(f"/proc/{process_id}/task/{process_id}/stat")


def start(url: str) -> tuple["subprocess.Popen[str]", int, str]:
    process = subprocess.Popen([sys.executable, __file__, "--serve", url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port, key = process.stdout.readline().split()
    return process, int(port), key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the store lies; default: a temporary folder")
    parser.add_argument("--database-url", default="", help="another store, such as postgresql://…")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        asyncio.run(serve(given.serve))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        url = given.database_url or f"sqlite:///{folder / 'billing.db'}"
        servers = {"without": start(""), "with": start(url)}
        times: dict[tuple[str, bool], list[Times]] = {}
        cpu: dict[str, list[tuple[float, float]]] = {kind: [] for kind in servers}
        flushes: list[float] = []
        try:
            for round_ in range(given.rounds + 1):
                for stream in (True, False):
                    for kind, (process, port, key) in servers.items():
                        before = cpu_seconds(process.pid)
                        measured = asyncio.run(load(port, key, given.streams, given.requests, stream=stream))
                        if round_:  # the first one warms up
                            times.setdefault((kind, stream), []).extend(measured)
                            after = cpu_seconds(process.pid)
                            cpu[kind].append((after[0] - before[0], after[1] - before[1]))
                flushes += flush_ms(folder)
        finally:
            for process, *_ in servers.values():
                process.terminate()
                process.wait(30)
    report: dict[str, Any] = {"streams": given.streams, "requests": given.requests * given.rounds}
    report["flush_ms_p50"] = round(statistics.median(flushes), 2)
    for index, what in enumerate(("cpu_ms_per_request", "of_that_event_loop")):
        ms = {kind: statistics.fmean(each[index] for each in cpu[kind]) * 1e3 / given.requests for kind in servers}
        report[what] = {kind: round(value, 2) for kind, value in ms.items()}
        report[what]["added"] = round(ms["with"] - ms["without"], 2)
    for stream, parts in (
        (True, {"first": 0, "last_token": 1, "end": 2, "after_step": 3}),
        (False, {"end": 2, "after_step": 3}),
    ):
        for what, index in parts.items():
            p50 = {kind: statistics.median(each[index] for each in times[kind, stream]) * 1e3 for kind in servers}
            name = f"{'stream' if stream else 'body'}_{what}_ms_p50"
            report[name] = {kind: round(value, 2) for kind, value in p50.items()}
            report[name]["added"] = round(p50["with"] - p50["without"], 2)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
