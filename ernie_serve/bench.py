"""Measures speed: one load generator, two targets (the engine behind its client, or a server over HTTP).

Knows clocks, percentiles and how to ask for tokens. Knows nothing of how tokens are made. A load is closed
(a fixed number of requests in flight) or open (requests arrive by a Poisson process at a rate).
"""

import asyncio
import json
import os
import platform
import random
import secrets
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import httpx
import uvloop

from ernie_serve import launch
from ernie_serve.config import Settings
from ernie_serve.engine.client import EngineClient
from ernie_serve.errors import EngineUnavailable, SettingsError, StartupError
from ernie_serve.messages import EngineRequest, SamplingParams


class Target(Protocol):
    """Something that continues a prompt of token ids and yields how many tokens came each time."""

    def stream(self, prompt: list[int], output_len: int, seed: int) -> AsyncIterator[int]:
        """Make exactly `output_len` tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to ask for. Lengths in tokens; `request_rate` in requests a second, `None` for a closed load."""

    num_prompts: int
    input_len: int
    output_len: int
    max_concurrency: int
    request_rate: float | None = None
    seed: int = 0

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random prompts: no two share a prefix, so that no cache helps."""
        chance = random.Random(self.seed)  # noqa: S311  # a reproducible load, not a secret
        return [[chance.randrange(3, vocab_size) for _ in range(self.input_len)] for _ in range(self.num_prompts)]


@dataclass(slots=True)
class Timeline:
    """When one request began and when its tokens came, in seconds of one clock."""

    start: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def first_token_seconds(self) -> float:
        """Time to first token."""
        return self.arrivals[0][0] - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds between the arrivals of tokens; tokens that come together share the time they took."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [gap for (a, _), (b, n) in pairs for gap in [(b - a) / n] * n]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measured load. Times in milliseconds, rates in tokens a second.

    `decode_tok_s` is `None` where there was no moment at which all requests decoded.
    """

    target: str
    input_len: int
    output_len: int
    concurrency: int
    request_rate: float | None
    requests: int
    seconds: float
    output_tok_s: float
    total_tok_s: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float
    decode_tok_s: float | None


async def measure(name: str, target: Target, load: Load, vocab_size: int) -> Result:
    """Run a load against a target, after one request that is not counted. The first that fails ends it."""
    return summarise(name, load, await timelines(target, load, vocab_size))


async def timelines(target: Target, load: Load, vocab_size: int) -> list[Timeline]:
    """What `measure` measures: a line for each request."""
    prompts = load.prompts(vocab_size)
    await _run(target, list(reversed(prompts[0])), min(4, load.output_len), seed=0)
    lines: list[Timeline] = []
    gate = asyncio.Semaphore(load.max_concurrency)

    async def one(index: int, prompt: list[int]) -> None:
        async with gate:
            lines.append(await _run(target, prompt, load.output_len, seed=index))

    chance = random.Random(load.seed)  # noqa: S311
    try:
        async with asyncio.TaskGroup() as group:
            for index, prompt in enumerate(prompts):
                group.create_task(one(index, prompt))
                if load.request_rate is not None:
                    await asyncio.sleep(chance.expovariate(load.request_rate))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return lines


async def _run(target: Target, prompt: list[int], output_len: int, seed: int) -> Timeline:
    line = Timeline(time.perf_counter())
    async for count in target.stream(prompt, output_len, seed):
        if count:
            line.arrivals.append((time.perf_counter(), count))
    return line


def summarise(name: str, load: Load, lines: Sequence[Timeline]) -> Result:
    """The result of these lines, which may be of several processes of one machine."""
    seconds = max(line.arrivals[-1][0] for line in lines) - min(line.start for line in lines)
    made = sum(count for line in lines for _, count in line.arrivals)
    first = [line.first_token_seconds * 1e3 for line in lines]
    gaps = [gap * 1e3 for line in lines for gap in line.gaps] or [0.0]
    last_first = max(line.arrivals[0][0] for line in lines)
    first_end = min(line.arrivals[-1][0] for line in lines)
    together = sum(n for line in lines for at, n in line.arrivals if last_first < at <= first_end)
    return Result(
        target=name,
        input_len=load.input_len,
        output_len=load.output_len,
        concurrency=load.max_concurrency,
        request_rate=load.request_rate,
        requests=len(lines),
        seconds=round(seconds, 3),
        output_tok_s=round(made / seconds, 2),
        total_tok_s=round((made + load.input_len * len(lines)) / seconds, 2),
        ttft_ms_p50=round(statistics.median(first), 1),
        ttft_ms_p99=round(_percentile(first, 0.99), 1),
        itl_ms_p50=round(statistics.median(gaps), 2),
        itl_ms_p99=round(_percentile(gaps, 0.99), 2),
        decode_tok_s=round(together / (first_end - last_first), 2) if first_end > last_first else None,
    )


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def run(settings: Settings, loads: Sequence[Load], mode: str, base_url: str | None, vocab_size: int) -> list[Result]:
    """Measure the server at `base_url`, or one of our own."""

    async def there(url: str) -> list[Result]:
        return [await measure_http(url, settings.model, load, vocab_size, settings.api_key) for load in loads]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the server itself does
        return runner.run(there(base_url) if base_url else measure_offline_and_http(settings, loads, mode))


def as_json(results: Sequence[Result]) -> str:
    """The results with what they were measured on."""
    machine = {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()}
    versions = {name: version(name) for name in ("ernie-serve", "torch", "tokenizers", "uvicorn")}
    facts = {"machine": machine, "versions": versions, "results": [asdict(result) for result in results]}
    return json.dumps(facts, indent=2) + "\n"


def require_writable(path: Path) -> None:
    """Raise `SettingsError` where results could not be written, before the time is spent on them."""
    try:
        new = not os.path.lexists(path)
        path.open("a", encoding="utf-8").close()
        if new:
            path.unlink()
    except OSError as error:
        raise SettingsError(
            f"--output-json {path} cannot be written: {error.strerror}. Give a file in a folder that is there."
        ) from None


async def measure_offline_and_http(settings: Settings, loads: Sequence[Load], mode: str) -> list[Result]:
    """Start a server on a free port of this machine and measure it: its engine alone, over HTTP, or both in turn.

    Both use the same engine, so their ratio is what HTTP costs. The load generator shares the API's process, which
    makes that cost look larger than it is from elsewhere, never smaller.
    """
    results = []
    async with launch.opened(settings.model_copy(update={"host": "127.0.0.1", "port": 0})) as house:
        serving = asyncio.create_task(house.serve())
        try:
            while house.client.state == "loading":  # noqa: ASYNC110  # the state is set from the reader's thread
                await asyncio.sleep(0.1)
            if house.client.state != "ready":
                raise StartupError(house.client.failure)
            vocab_size = house.text.tokenizer.vocab_size
            for load in loads:
                if mode in ("offline", "both"):
                    results.append(await measure("engine", EngineTarget(house.client), load, vocab_size))
                if mode in ("http", "both"):
                    results.append(await measure_http(house.url, house.names[0], load, vocab_size, settings.api_key))
        finally:
            house.server.stop(grace_seconds=1)
            await serving
    return results


async def measure_http(url: str, model: str, load: Load, vocab_size: int, keys: Sequence[str] = ()) -> Result:
    """Measure a server that runs already."""
    target = HttpTarget(url, model, api_key=next(iter(keys), "none"))
    try:
        return await measure("http", target, load, vocab_size)
    finally:
        await target.close()


class EngineTarget:
    """An engine behind its client."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    async def stream(self, prompt: list[int], output_len: int, seed: int) -> AsyncIterator[int]:
        """Make exactly `output_len` tokens."""
        sampling = SamplingParams(max_tokens=output_len, seed=seed)
        request = EngineRequest(request_id=f"bench-{secrets.token_hex(8)}", prompt_token_ids=prompt, sampling=sampling)
        try:
            async for output in self._client.generate(request):
                if output.finish_reason == "error":
                    raise StartupError(f"The engine refused a request: {output.error} {_REMEDIES[400]}")
                yield len(output.token_ids)
        except EngineUnavailable as error:
            raise StartupError(error.message) from None


class HttpTarget:
    """A server that speaks the completions API; prompts go out as token ids, answers come as a stream.

    `extra` joins, or replaces, fields of the requests: what another server calls something else. Raises `StartupError`
    with what the server says where it refuses a request, or with why it cannot be reached.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str = "none",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > 65_535:
            raise SettingsError(f"--base-url is `{base_url[:200]}`, which is no address. {_EXAMPLE}")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        headers = {"authorization": f"Bearer {api_key}"}
        self._http = httpx.AsyncClient(base_url=base_url, headers=headers, timeout=600, limits=limits)
        self._url = base_url
        self._model = model
        self._extra = extra or {}

    async def stream(self, prompt: list[int], output_len: int, seed: int) -> AsyncIterator[int]:
        """Make exactly `output_len` tokens; what a last usage chunk adds is counted as coming with it."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_len,
            "temperature": 1.0,
            "seed": seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }
        seen = 0
        try:
            async with self._http.stream("POST", "/completions", json=body) as response:
                if response.status_code != 200:
                    raise self._refused(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    if chunk.get("error"):
                        raise self._refused(500, line[6:].encode())
                    usage = chunk.get("usage")
                    count = usage["completion_tokens"] - seen if usage else len(chunk["choices"])
                    seen += count
                    yield count
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise StartupError(
                f"The server at {self._url} cannot be reached, or went away: {why}. Start it, or change --base-url."
            ) from None
        if not seen:
            raise StartupError(f"The server at {self._url} answered without a token. {_EXAMPLE}")

    def _refused(self, status: int, body: bytes) -> StartupError:
        try:
            said = str(json.loads(body)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            said = body.decode(errors="replace")[:300]
        remedy = _REMEDIES.get(status, "Its log may say more.")
        return StartupError(f"The server at {self._url} answered {status}: {' '.join(said.split())} {remedy}")

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


_EXAMPLE = "Give --base-url the address of an OpenAI-compatible API, such as http://127.0.0.1:8000/v1."
_REMEDIES = {
    400: "--input-len, --output-len and --vocab-size say what is asked for.",
    401: "Give its key to --api-key, or to ERNIE_SERVE_API_KEY.",
    404: "MODEL is the name of its model, and --base-url ends like http://127.0.0.1:8000/v1.",
    429: "Give less to --max-concurrency, or to --request-rate.",
}
"""What to do about a refusal, by its status."""


def table(results: Sequence[Result], emit: Callable[[Any], None]) -> None:
    """Hand a printable table of the results to `emit`."""
    from rich.table import Table

    shown = Table(box=None, header_style="bold")
    columns = {
        "target": "target",
        "in": "input_len",
        "out": "output_len",
        "streams": "concurrency",
        "req/s": "request_rate",
        "tok/s": "output_tok_s",
        "decode tok/s": "decode_tok_s",
        "TTFT p50 ms": "ttft_ms_p50",
        "p99": "ttft_ms_p99",
        "ITL p50 ms": "itl_ms_p50",
        "p99 ": "itl_ms_p99",
    }
    for heading in columns:
        shown.add_column(heading, justify="left" if heading == "target" else "right")
    for result in results:
        values = asdict(result)
        shown.add_row(*(str(values[key] or "-") for key in columns.values()))
    emit(shown)
