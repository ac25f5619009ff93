"""What the comparison asks for and what it makes of the answers; the servers themselves are not started here."""

import asyncio
import functools
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ernie_serve import bench
from ernie_serve.errors import SettingsError, StartupError
from ernie_serve.model.random_checkpoint import write_random_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import gpu_compare  # scripts are no package of ours

ROOT = Path(__file__).parents[2]


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
        target=side, seconds=1.0, output_tok_s=rate, total_tok_s=rate, decode_tok_s=0.0, **shape, **times
    )


async def counts_of(target: Any, output_len: int) -> list[int]:
    return [count async for count in target.stream([3], output_len, 0)]


def test_a_closed_load_keeps_its_streams_and_an_open_one_waits_for_nobody() -> None:
    closed, opened = gpu_compare.parse_load("8x2048x512"), gpu_compare.parse_load("8x2048x512@2.5")
    assert (closed.max_concurrency, closed.num_prompts, closed.request_rate) == (8, 16, None)
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


def test_requests_ask_for_nothing_that_one_server_pays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        chunk = json.dumps({"choices": [{"text": "a"}], "usage": {"completion_tokens": asked[-1]["max_tokens"]}})
        return httpx.Response(200, text=f"data: {chunk}\n\ndata: [DONE]\n\n")

    client = functools.partial(httpx.AsyncClient, transport=httpx.MockTransport(answer))
    monkeypatch.setattr(httpx, "AsyncClient", client)
    load = bench.Load(num_prompts=1, input_len=3, output_len=4, max_concurrency=1)
    asyncio.run(gpu_compare.measure(gpu_compare.Side("ours", []), "http://127.0.0.1:1", load, 10))
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


@pytest.mark.slow
def test_a_server_beside_itself_is_asked_only_for_ids_that_its_tokenizer_has(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "model", "tiny")  # its network has 1,024 ids, its tokenizer 1,016
    server = (
        f"{sys.executable} -m ernie_serve serve {{model}} --port {{port}} --served-model-name {{name}} --device cpu"
    )
    command = [sys.executable, "scripts/gpu_compare.py", str(tmp_path / "model"), "--ours", server, "--theirs", server]
    command += ["--loads", "2x300x4", "--repeats", "1", "--out", str(tmp_path / "out.json")]
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
