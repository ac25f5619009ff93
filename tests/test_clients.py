"""Clients that others wrote, against a server in a process of its own: the npm package, and what lm-eval sends."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import MODEL, running

CLIENTS = Path(__file__).parent / "clients"
NPM_PACKAGE = "openai@6.49.0"


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path) -> Iterator[str]:
    """The API's address."""
    with running(tiny_checkpoint, "--max-model-len", "4096") as server:
        yield server.url


@pytest.fixture(scope="module")
def npm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a module may import the npm package `openai`."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("npm")
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0", NPM_PACKAGE]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=90)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip(f"the npm registry does not give {NPM_PACKAGE}")
    return folder


@pytest.mark.slow
def test_the_npm_package_sees_openai(url: str, npm_folder: Path) -> None:
    script = shutil.copy(CLIENTS / "openai_client.mjs", npm_folder)
    done = subprocess.run(["node", script, url, MODEL], cwd=npm_folder, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert MODEL in told["models"]
    assert told["whole"] == told["streamed"] == told["helped"]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [told["helpedUsage"][name] for name in counts] == [told["usage"][name] for name in counts]
    for call in (told["call"], told["streamedCall"]):
        assert call["name"] == "forecast"
        assert fits(json.loads(call["arguments"]))
    assert told["callReason"] in ("tool_calls", "stop")
    assert told["results"]
    assert all(fits(given) for given in told["results"])
    assert told["runnerRoles"] == ["user", "assistant", "tool"]
    assert fits(told["parsed"])
    assert told["response"] == told["retrieved"]
    assert told["events"][:2] == ["response.created", "response.in_progress"]
    assert told["events"][-1] in ("response.completed", "response.incomplete")
    assert told["deltas"] == "".join(part["text"] for item in told["final"] for part in item.get("content", []))
    ((name, arguments),) = told["acted"][:1]
    assert name == "forecast"
    assert fits(json.loads(arguments))
    assert told["failures"] == {
        "gone": ["NotFoundError", 404, None, None],
        "model": ["NotFoundError", 404, "model_not_found", "model"],
        "range": ["BadRequestError", 400, None, "temperature"],
    }


def fits(arguments: Any) -> bool:
    """Whether these are arguments as the tool's schema wants them."""
    return (
        arguments.keys() == {"unit", "days"}
        and arguments["unit"] in ("celsius", "fahrenheit")
        and arguments["days"] in range(1, 10)
    )


def test_responses_of_a_file_outlive_their_server(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--responses-file", str(tmp_path / "responses.sqlite")]
    asked = {"model": MODEL, "input": "Hello", "max_output_tokens": 4}
    with running(tiny_checkpoint, *flags) as server:
        made = httpx.post(f"{server.url}/responses", json=asked, timeout=60).raise_for_status().json()
        assert server.end()[0] == 0
    with running(tiny_checkpoint, *flags) as server:
        assert httpx.get(f"{server.url}/responses/{made['id']}").json() == made
        more = asked | {"previous_response_id": made["id"]}
        longer = httpx.post(f"{server.url}/responses", json=more, timeout=60).raise_for_status().json()
    assert longer["usage"]["input_tokens"] > made["usage"]["input_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_forbids_every_token_is_the_client_s_error(url: str, stream: bool) -> None:
    ids = httpx.post(f"{url.removesuffix('/v1')}/tokenize", json={"model": MODEL, "prompt": "a"}).json()["tokens"]
    body = {"model": MODEL, "prompt": "x", "allowed_token_ids": ids[-1:], "bad_words": ["a"], "stream": stream}
    answer = httpx.post(f"{url}/completions", json=body, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "allowed_token_ids")


@pytest.fixture(scope="module")
def scored(tiny_checkpoint: Path) -> list[tuple[list[int], int, float, bool]]:
    """Token ids, how many of them are context, and how likely transformers finds the rest; whether it is greedy.

    The vocabulary is padded, and its padding has its share.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ernie_serve.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(tiny_checkpoint)
    assert tokenizer.vocab_size < json.loads((tiny_checkpoint / "config.json").read_text())["vocab_size"]
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    lines = (CLIENTS / "continuations.jsonl").read_text(encoding="utf-8").splitlines()
    rows = []
    for document in map(json.loads, lines):
        for ending in document["endings"]:
            context = tokenizer.encode(document["beginning"])
            ids = tokenizer.encode(f"{document['beginning']} {ending}")
            with torch.inference_mode():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            at = range(len(context), len(ids))
            total = sum(logs[i - 1, ids[i]].item() for i in at)
            rows.append((ids, len(context), total, all(logs[i - 1].argmax().item() == ids[i] for i in at)))
    return rows


def sums(choice: dict[str, Any], num_context: int, num_tokens: int) -> tuple[float, bool]:
    """The log-likelihood and the greediness of what follows the context, read as lm-eval reads them."""
    told = choice["logprobs"]
    values = told["token_logprobs"][num_context:num_tokens]
    tops = told["top_logprobs"][num_context:num_tokens]
    assert len(values) == num_tokens - num_context
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_lm_eval_scores_token_ids_as_transformers_does(
    url: str, scored: list[tuple[list[int], int, float, bool]], max_tokens: int, batch_size: int
) -> None:
    for start in range(0, len(scored), batch_size):
        rows = scored[start : start + batch_size]
        body = harness_body([ids for ids, *_ in rows], max_tokens)
        choices = httpx.post(f"{url}/completions", json=body, timeout=60).raise_for_status().json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(rows)))
        for choice, (ids, num_context, total, greedy) in zip(choices, rows, strict=True):
            assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + max_tokens
            assert sums(choice, num_context, len(ids)) == (pytest.approx(total, abs=1e-3), greedy)


def test_lm_eval_scores_strings_as_transformers_does(
    url: str, scored: list[tuple[list[int], int, float, bool]], tiny_checkpoint: Path
) -> None:
    from ernie_serve.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(tiny_checkpoint)
    for ids, num_context, total, greedy in scored:
        body = harness_body(tokenizer.decode(ids), 1)
        (choice,) = httpx.post(f"{url}/completions", json=body, timeout=60).raise_for_status().json()["choices"]
        assert sums(choice, num_context, len(ids)) == (pytest.approx(total, abs=1e-3), greedy)


def harness_body(prompt: object, max_tokens: int) -> dict[str, Any]:
    """Word for word what lm-eval's `local-completions` sends for log-likelihoods."""
    return {
        "model": MODEL,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
