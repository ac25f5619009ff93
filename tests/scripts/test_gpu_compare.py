"""What the comparison asks for and what it makes of the answers; the servers themselves are not started here."""

import argparse
import asyncio
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import httpx
import pytest

from ernie_serve import bench
from ernie_serve.errors import SettingsError, StartupError
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.random_checkpoint import GEOMETRIES, write_random_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import gpu_compare  # scripts are no package of ours

ROOT = Path(__file__).parents[2]


ERNIE_TINY = ROOT / "ernie_serve/bundled/ernie-tiny"
STAND_IN = """
import json, os, signal, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

name, status, notes, port = sys.argv[1], int(sys.argv[2]), open(sys.argv[3], "a", buffering=1), int(sys.argv[4])

class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200 if self.path == "/version" else status, b"{}")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        print(name, len(asked["prompt"]), file=notes)
        usage = {"completion_tokens": asked["max_tokens"]}
        self.answer(200, b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\\n\\n")

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

def end(*_):
    print(name, "ends", file=notes)
    os._exit(0)

signal.signal(signal.SIGTERM, end)
threading.Timer(30, end).start()  # should nobody end it
print(name, "starts", file=notes)
ThreadingHTTPServer(("127.0.0.1", port), Answers).serve_forever()
"""
"""A server that notes when it starts, what it is asked, and that it ends."""


class Says:
    """A target that answers in pieces of these counts."""

    def __init__(self, *counts: int) -> None:
        self.counts = counts

    async def stream(self, prompt: list[int], output_len: int, seed: int) -> AsyncIterator[int]:
        for count in self.counts:
            yield count


def result(side: str, rate: float) -> bench.Result:
    times = dict.fromkeys(("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99"), 10.0)
    shape: dict[str, Any] = {"input_len": 8, "output_len": 4, "concurrency": 2, "request_rate": None, "requests": 4}
    return bench.Result(
        target=side, seconds=1.0, output_tok_s=rate, total_tok_s=rate, decode_tok_s=None, **shape, **times
    )


async def counts_of(target: Any, output_len: int) -> list[int]:
    return [count async for count in target.stream([3], output_len, 0)]


def test_a_closed_load_keeps_its_streams_and_an_open_one_waits_for_nobody() -> None:
    closed, opened = gpu_compare.parse_load("8x2048x512"), gpu_compare.parse_load("8x2048x512@2.5")
    assert (closed.max_concurrency, closed.num_prompts, closed.request_rate) == (8, 8, None)
    assert (opened.max_concurrency, opened.num_prompts, opened.request_rate) == (16, 16, 2.5)
    assert (closed.input_len, closed.output_len) == (2048, 512)


@pytest.mark.parametrize("text", ["", "8x2048", "0x8x8", "8x8x8@0", "axbxc"])
def test_a_load_that_cannot_be_read_is_refused_by_name(text: str) -> None:
    with pytest.raises(SettingsError, match="--loads"):
        gpu_compare.parse_load(text)


def test_an_answer_of_another_length_ends_the_comparison() -> None:
    assert asyncio.run(counts_of(gpu_compare.Exact(Says(1, 3)), 4)) == [1, 3]
    with pytest.raises(StartupError, match="3 tokens where 4"):
        asyncio.run(counts_of(gpu_compare.Exact(Says(1, 2)), 4))


class Here(Executor):
    """Does what it is given at once, in this process."""

    def submit(self, fn: Any, *args: Any, **named: Any) -> Future[Any]:  # type: ignore[override]
        done: Future[Any] = Future()
        done.set_result(fn(*args, **named))
        return done


def test_many_streams_are_sent_by_several_processes_and_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bench.Load] = []

    def timelines(side: gpu_compare.Side, root: str, load: bench.Load, vocab_size: int) -> list[bench.Timeline]:
        sent.append(load)
        at = float(len(sent))
        return [bench.Timeline(at, [(at + 1, 1), (at + 2, 1)]) for _ in range(load.num_prompts)]

    monkeypatch.setattr(gpu_compare, "_timelines", timelines)
    load = bench.Load(num_prompts=150, input_len=3, output_len=2, max_concurrency=130)
    found = gpu_compare.measure(Here(), gpu_compare.Side("ours", []), "http://127.0.0.1:1", load, 10)
    assert [(each.num_prompts, each.max_concurrency) for each in sent] == [(50, 44), (50, 43), (50, 43)]
    assert len({tuple(each.prompts(1000)[0]) for each in sent}) == 3, "no two prompts are alike"
    assert (found.requests, found.concurrency, found.seconds) == (150, 130, 4.0)
    assert found.output_tok_s == 75.0


def test_requests_ask_for_nothing_that_one_server_pays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        chunk = json.dumps({"choices": [{"text": "a"}], "usage": {"completion_tokens": asked[-1]["max_tokens"]}})
        return httpx.Response(200, text=f"data: {chunk}\n\ndata: [DONE]\n\n")

    client = functools.partial(httpx.AsyncClient, transport=httpx.MockTransport(answer))
    monkeypatch.setattr(httpx, "AsyncClient", client)
    load = bench.Load(num_prompts=1, input_len=3, output_len=4, max_concurrency=1)
    gpu_compare.measure(Here(), gpu_compare.Side("ours", []), "http://127.0.0.1:1", load, 10)
    sampling = {name: asked[-1][name] for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")}
    assert sampling == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": None}


def test_medians_spreads_and_the_ratio_of_ours_to_theirs() -> None:
    rates = {"theirs": (10.0, 30.0, 20.0), "ours": (50.0, 30.0, 40.0)}
    found = [gpu_compare.Measured("tuned", side, "2x8x4", result(side, rate)) for side in rates for rate in rates[side]]
    (point,) = gpu_compare.summary(found)
    assert point["ours.output_tok_s"] == {"median": 40.0, "spread": [30.0, 50.0]}
    assert point["ratio.output_tok_s"] == 2.0
    assert point["ratio.ttft_ms_p50"] == 1.0
    assert point["ratio.decode_tok_s"] is None, "nothing was decoded by all at once: there is nothing to divide"


def together(folder: Path, ours: int = 200, theirs: str | None = None) -> argparse.Namespace:
    """Arguments for stand-ins that answer with these statuses; they note what they do in one file."""
    (folder / "stand_in.py").write_text(STAND_IN)
    command = f"{sys.executable} {folder}/stand_in.py {{side}} {{status}} {folder}/notes {{{{port}}}}"
    return argparse.Namespace(
        model=str(ERNIE_TINY),
        ours=command.format(side="ours", status=ours),
        theirs=theirs or command.format(side="theirs", status=200),
        vllm="no-such-vllm",
        loads="1x8x2,2x16x2,1x24x2",
        repeats=1,
        rounds=1,
        together=True,
        kv_cache_memory_bytes=None,
        out=folder / "out.json",
    )


def config() -> dict[str, Any]:
    return json.loads((ERNIE_TINY / "config.json").read_text())


def test_together_both_live_at_once_and_take_turns(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found, _ = gpu_compare.run(together(tmp_path), config())
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert {tuple(note) for note in notes[:2]} == {("ours", "starts"), ("theirs", "starts")}
    assert {tuple(note) for note in notes[-2:]} == {("ours", "ends"), ("theirs", "ends")}
    asked = [(side, int(length), len(list(same))) for (side, length), same in itertools.groupby(notes[2:-2])]
    warm_ups = [("ours", 8, 4), ("ours", 16, 4), ("theirs", 8, 4), ("theirs", 16, 4)]
    assert asked == [
        *warm_ups,
        *(("ours", 8, 4), ("theirs", 8, 4)),
        *(("theirs", 16, 4), ("ours", 16, 4)),
        *(("ours", 24, 4), ("theirs", 24, 4)),
    ]
    kept = [json.loads(line)["side"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert kept == [each.side for each in found] == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    told = capfd.readouterr().err.splitlines()
    assert len(told) == len(found)
    assert all(metric in line for line in told for metric in gpu_compare.TOLD)


def test_together_one_that_fails_to_start_is_named_and_ends_the_other(tmp_path: Path) -> None:
    waits = f"until grep -qs starts {tmp_path}/notes; do sleep 0.02; done"
    theirs = f"sh -c '{waits}; echo no card; exit 1'"
    with pytest.raises(StartupError, match=r"theirs ended with 1 before it was ready:\nno card"):
        gpu_compare.run(together(tmp_path, ours=503, theirs=theirs), config())  # ours would never be ready
    assert (tmp_path / "notes").read_text() == "ours starts\nours ends\n"
    assert (tmp_path / "out.given.theirs.log").read_text() == "no card\n"


def test_turns_go_on_from_load_to_load() -> None:
    both = [gpu_compare.Side("ours", []), gpu_compare.Side("theirs", [])]
    order = [(text, repeat, side.name[0]) for text, repeat, side in gpu_compare.turns(["a", "b"], 3, both)]
    assert "".join(name for *_, name in order) == "ottoottootto"
    assert [(text, repeat) for text, repeat, _ in order[::2]] == [(text, n) for text in "ab" for n in range(3)]
    alone = [(text, repeat) for text, repeat, _ in gpu_compare.turns(["a", "b"], 2, both[:1])]
    assert alone == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_both_get_a_cache_that_holds_the_largest_load() -> None:
    loads = [gpu_compare.parse_load(text) for text in ("4x1000x100", "1x2000x200")]
    each = 2 * 4 * 2 * 16 * 2  # keys and values of 4 layers, 2 heads of 16, 2 bytes
    size = gpu_compare.cache_bytes(ModelConfig.from_dict(GEOMETRIES["tiny"]), loads)
    assert size == 4 * 18 * 64 * each * 11 // 10, "1,100 tokens are 18 blocks"
    args = argparse.Namespace(together=True, kv_cache_memory_bytes=None, ours=None, theirs=None, vllm=sys.executable)
    for given, flag in ((None, size), (5_000_000, 5_000_000)):
        args.kv_cache_memory_bytes = given
        for side in gpu_compare.sides(args, "defaults", dict(GEOMETRIES["tiny"]), loads):
            assert side.command[side.command.index("--kv-cache-memory-bytes") + 1] == str(flag)
            assert side.command[side.command.index("--gpu-memory-utilization") + 1] == "0.4"
    args.together = False
    for side in gpu_compare.sides(args, "defaults", dict(GEOMETRIES["tiny"]), loads):
        assert "--kv-cache-memory-bytes" not in side.command


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--together"]])
def test_a_server_beside_itself_is_asked_only_for_ids_that_its_tokenizer_has(how: list[str], tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "model", "tiny")  # its network has 1,024 ids, its tokenizer 1,016
    server = (
        f"{sys.executable} -m ernie_serve serve {{model}} --port {{port}} --served-model-name {{name}} --device cpu"
    )
    command = [sys.executable, "scripts/gpu_compare.py", str(tmp_path / "model"), "--ours", server, "--theirs", server]
    command += ["--loads", "2x300x4", "--repeats", "1", "--out", str(tmp_path / "out.json"), *how]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=environ)
    assert done.returncode == 0, done.stderr
    (point,) = json.loads((tmp_path / "out.json").read_text())["points"]
    assert point["ratio.output_tok_s"] > 0
    sides = [json.loads(line)["side"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sides == ["ours", "theirs"], "what was measured is kept as it comes"


def test_without_vllm_it_says_how_to_get_it() -> None:
    model = str(ROOT / "ernie_serve/bundled/ernie-tiny")
    command = [sys.executable, "scripts/gpu_compare.py", model, "--vllm", "no-such-vllm", "--out", "/dev/null"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert "'no-such-vllm'" in done.stderr
    assert "pip install vllm" in done.stderr
