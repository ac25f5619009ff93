"""What billing adds to a request over HTTP, beside what the disk itself takes to flush.

Asks two servers of `scripted_server.py` with many streams at once, in turns: one bills, the other does not. Nothing of
a model is measured. The asking is done with as little computing as can be, since it happens on the same cores and its
own delays would count as the server's.

    .venv/bin/python scripts/bench_billing.py [--folder FOLDER] [--streams 64] [--requests 510] [--rounds 5] [--apart]
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import uvloop
from scripted_server import MARK_BASE, STEP_SECONDS

TOKENS = range(8, 25)
"""Answers have so many tokens in turn, so that of 64 in flight about four end with a step."""


@dataclass(slots=True)
class Times:
    """When one request was sent, and when its last token's chunk and its end had come; 0.0 where it has no chunks."""

    sent: float
    last_token: float = 0.0
    end: float = 0.0


class Asker(asyncio.Protocol):
    """One connection that asks one thing after the other and notes when the answers come."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._received = b""
        self._whole_bytes = 0
        self._times = Times(0.0)
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # of uvloop, which does not say what it is

    async def ask(self, request: bytes) -> Times:
        self._received, self._whole_bytes = b"", 0
        self._done = asyncio.get_running_loop().create_future()
        self._times = Times(time.monotonic())
        self.transport.write(request)
        await self._done
        assert self._received.startswith(b"HTTP/1.1 200 "), self._received
        return self._times

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self._received += data
        if self._whole_bytes == 0:
            head, end, _ = self._received.partition(b"\r\n\r\n")
            if not end:
                return
            _, length, rest = head.lower().partition(b"content-length:")
            self._whole_bytes = len(head) + 4 + int(rest.partition(b"\r\n")[0]) if length else -1
        if self._whole_bytes < 0:
            if b"[DONE]" not in data and not data.endswith(b"0\r\n\r\n"):
                self._times.last_token = now
            ended = self._received.endswith(b"\r\n0\r\n\r\n")
        else:
            ended = len(self._received) >= self._whole_bytes
        if ended:
            self._times.end = now
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(error or ConnectionError("The server closed the connection."))


@dataclass(slots=True)
class Server:
    """One of the two, and what was measured of it: by stream or body the milliseconds of each part of a request."""

    process: "subprocess.Popen[str]"
    port: int
    key: str
    notes: Path
    marks: "itertools.count[int]" = field(default_factory=itertools.count)
    parts: dict[tuple[bool, str], list[float]] = field(default_factory=dict)
    cpu_ms: list[tuple[float, float]] = field(default_factory=list)

    def request(self, mark: int, tokens: int, *, stream: bool) -> bytes:
        prompt = [*divmod(mark, MARK_BASE)] + [7] * 62
        body = json.dumps({"model": "bench", "prompt": prompt, "max_tokens": tokens, "stream": stream})
        return (
            f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {self.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}"
        ).encode()

    def cpu_seconds(self) -> tuple[float, float]:
        """What the process and, of that, its main thread, which runs the event loop, have computed."""
        tick = os.sysconf("SC_CLK_TCK")

        def used(path: str) -> float:
            fields = Path(path).read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / tick

        process_id = self.process.pid
        return used(f"/proc/{process_id}/stat"), used(f"/proc/{process_id}/task/{process_id}/stat")


async def load(server: Server, streams: int, requests: int, *, stream: bool, keep: bool, apart: bool) -> None:
    """Ask so many requests, so many at once, and keep what was measured while that many were in flight.

    One follows the other, so that several are asked together, after a step; `apart` they come at any time of it.
    """
    loop = asyncio.get_running_loop()
    marks = list(itertools.islice(server.marks, requests))
    asked = iter(marks)
    times: dict[int, Times] = {}
    chance = random.Random(len(marks))
    tokens = dict(zip(marks, itertools.cycle(TOKENS), strict=False))

    async def ask_on() -> None:
        transport, asker = await loop.create_connection(Asker, "127.0.0.1", server.port)
        for mark in asked:
            if apart:
                await asyncio.sleep(chance.random() * STEP_SECONDS)
            request = server.request(mark, tokens[mark], stream=stream)
            times[mark] = await asker.ask(request)
        transport.close()

    before = server.cpu_seconds()
    await asyncio.gather(*(ask_on() for _ in range(streams)))
    after = server.cpu_seconds()
    if not keep:
        return
    used = [(late - early) * 1e3 / requests for early, late in zip(before, after, strict=True)]
    server.cpu_ms.append((used[0], used[1]))
    await asyncio.sleep(0.1)  # the engine notes a request after it has told its end
    for mark in marks[:streams] + marks[-streams:]:  # all at once, and fewer and fewer
        del times[mark]
    for line in server.notes.read_text().splitlines():
        mark, came, stepped = line.split()
        if (found := times.get(int(mark))) is None:
            continue
        before_ms, after_ms = (float(came) - found.sent) * 1e3, (found.end - float(stepped)) * 1e3
        steps_ms = tokens[int(mark)] * STEP_SECONDS * 1e3
        told = {"before_engine": before_ms, "after_engine": after_ms, "outside_engine": before_ms + after_ms}
        told["whole_but_steps"] = (found.end - found.sent) * 1e3 - steps_ms
        if stream:
            told["last_token_after_engine"] = (found.last_token - float(stepped)) * 1e3
        for part, ms in told.items():
            server.parts.setdefault((stream, part), []).append(ms)


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


def start(url: str, notes: Path) -> Server:
    script = Path(__file__).parent / "scripted_server.py"
    command = [sys.executable, script, "--url", url, "--notes", notes]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port, key = process.stdout.readline().split()
    return Server(process, int(port), key, notes)


def beside(without: float, with_: float) -> dict[str, float]:
    return {"without": round(without, 2), "with": round(with_, 2), "added": round(with_ - without, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the store lies; default: a temporary folder")
    parser.add_argument("--database-url", default="", help="another store, such as postgresql://…")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=510)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--apart", action="store_true", help="requests come at any time of a step, not after it")
    given = parser.parse_args()
    if given.requests <= 2 * given.streams:
        parser.error("--requests must be more than twice --streams: the first and the last ones do not count.")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        url = given.database_url or f"sqlite:///{folder / 'billing.db'}"
        servers = [start("", folder / "without"), start(url, folder / "with")]
        flushes: list[float] = []
        try:
            for round_ in range(given.rounds + 1):  # the first one warms up
                for stream, server in itertools.product((True, False), servers[:: (-1) ** round_]):
                    measured = load(
                        server, given.streams, given.requests, stream=stream, keep=round_ > 0, apart=given.apart
                    )
                    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                        runner.run(measured)
                flushes += flush_ms(folder)
        finally:
            for server in servers:
                server.process.send_signal(signal.SIGTERM)
                server.process.wait(30)
    counted = (given.requests - 2 * given.streams) * given.rounds
    report: dict[str, Any] = {"streams": given.streams, "requests_counted": counted}
    report["flush_ms_p50"] = round(statistics.median(flushes), 2)
    for index, what in enumerate(("cpu_ms_per_request", "of_that_event_loop")):
        report[what] = beside(*(statistics.fmean(each[index] for each in server.cpu_ms) for server in servers))
    for stream, part in servers[0].parts:
        medians = [statistics.median(server.parts[stream, part]) for server in servers]
        report[f"{'stream' if stream else 'body'}_{part}_ms_p50"] = beside(*medians)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
