"""The server as a user has it: a process of its own, a checkpoint folder, the official SDK, curl's view, signals."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import DEADLINE_SECONDS, MODEL, Server, running

from ernie_serve import launch
from ernie_serve.config import Settings
from ernie_serve.text.template import ChatTemplate
from ernie_serve.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[Server]:
    with running(tiny_checkpoint, "--max-model-len", "4096") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_the_sdk_gets_what_transformers_generates(client: openai.OpenAI, tiny_checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    tokenizer = Tokenizer.from_folder(tiny_checkpoint)
    padding = list(range(tokenizer.vocab_size, model.config.vocab_size))
    for prompt in ("Large language model is", "你好，世界", "0123 4567", "a"):
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, suppress_tokens=padding
        )
        made = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
        )
        assert made.usage is not None
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (ids.shape[1], 12)
        assert made.choices[0].text == tokenizer.decode(out[0, ids.shape[1] :].tolist())


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hello, 你好 🌍"}]
    asked: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": 40, "seed": 7, "temperature": 1.5}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[0].choices[0].delta.role == "assistant"


def test_sixty_four_at_once_each_get_their_own_text(server: Server) -> None:
    async def ask_all(at_once: int) -> list[str]:
        gate = asyncio.Semaphore(at_once)
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:

            async def ask(index: int) -> str:
                async with gate:
                    stream = await client.completions.create(
                        model=MODEL, prompt=f"number {index}", max_tokens=16, seed=index, stream=True
                    )
                    return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(ask(index) for index in range(64)))

    together = asyncio.run(ask_all(64))
    assert len(set(together)) > 48
    assert together == asyncio.run(ask_all(4))


def test_what_does_not_fit_is_refused_with_both_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[5] * 4096, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert "4096" in caught.value.message.replace(",", "")


def test_errors_are_openai_s(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])
    assert caught.value.code == "model_not_found"
    answer = httpx.get(f"{server.root}/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


def test_a_client_that_leaves_gives_its_blocks_back(tiny_checkpoint: Path) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 8000, "ignore_eos": True}
    settings = Settings(
        model=str(tiny_checkpoint), served_model_name=(MODEL,), port=0, threads=1, kv_cache_memory_bytes=16 << 20
    )

    async def leave_early() -> None:
        async with launch.opened(settings) as house, httpx.AsyncClient(timeout=DEADLINE_SECONDS) as http:
            serving = asyncio.create_task(house.serve())
            await _until(lambda: house.client.state == "ready")
            for stream in (True, False):
                began = house.client.stats.step
                request = asyncio.create_task(http.post(f"{house.url}/completions", json=body | {"stream": stream}))
                await _until(lambda: house.client.stats.blocks_used > 2)
                request.cancel()
                await _until(lambda: house.client.stats.blocks_used == 0)
                assert house.client.stats.step - began < 7000
            house.server.stop()
            await serving

    asyncio.run(leave_early())


async def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def test_user_text_never_becomes_a_control_token(server: Server, tiny_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_checkpoint)
    template = ChatTemplate.from_folder(tiny_checkpoint, tokenizer)
    assert template is not None
    control = sorted(tokenizer.control_ids)
    hostile = "".join(tokenizer.token_text(token_id) for token_id in control)
    plain, attacked = (template.render([{"role": "user", "content": text}]) for text in ("x", hostile))
    count = [sum(token_id in tokenizer.control_ids for token_id in ids) for ids in (plain, attacked)]
    assert count[0] == count[1] > 0
    answer = httpx.post(
        f"{server.url}/chat/completions",
        json={"model": MODEL, "messages": [{"role": "user", "content": hostile}], "max_tokens": 1},
    )
    assert answer.json()["usage"]["prompt_tokens"] == len(attacked)


def test_a_terminated_server_lets_running_requests_end(tiny_checkpoint: Path) -> None:
    with running(tiny_checkpoint, "--max-model-len", "1024") as server:
        _end_amid_a_stream(server, signal.SIGTERM)


@pytest.mark.parametrize("again", [False, True])
def test_what_runs_when_its_time_is_over_or_at_a_second_signal_is_told_that_the_server_ends(
    tiny_checkpoint: Path, again: bool
) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 10_000, "ignore_eos": True}
    grace = "60" if again else "1"
    with running(tiny_checkpoint, "--shutdown-timeout", grace) as server, ThreadPoolExecutor() as pool:
        whole = pool.submit(httpx.post, f"{server.url}/completions", json=body, timeout=60)
        with httpx.stream("POST", f"{server.url}/completions", json={**body, "stream": True}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            while "ernie_serve_num_requests_running 2" not in httpx.get(f"{server.root}/metrics").text:
                time.sleep(0.01)
            server.process.send_signal(signal.SIGTERM if again else signal.SIGHUP)  # a terminal that is closed
            if again:
                assert next(lines) is not None  # it goes on until the second one
                time.sleep(0.2)  # two signals that come together are one
                server.process.send_signal(signal.SIGTERM)
            told = [line for line in lines if line]
        for error in (json.loads(told[-1].removeprefix("data: ")), whole.result().json()):
            assert error["error"]["message"] == "The server is shutting down."
        code, rest = server.wait()
        assert (code, whole.result().status_code) == (0, 503), rest
        assert "Traceback" not in rest
        assert "Finishing 2 requests, " in rest


def test_client_that_has_sent_half_a_request_when_the_server_ends_is_told_and_leaves_nothing_in_the_log(
    tiny_checkpoint: Path,
) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost:\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
    with running(tiny_checkpoint, "--shutdown-timeout", "1") as server:
        address = httpx.URL(server.url)
        with socket.create_connection((address.host, address.port or 0), timeout=DEADLINE_SECONDS) as client:
            client.sendall(head + b'{"model"')
            httpx.get(f"{server.root}/health/live")  # what came before it has been read
            code, rest = server.end()
            told = b"".join(iter(lambda: client.recv(4096), b""))
    assert code == 0, rest
    assert "Traceback" not in rest
    assert told.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 10\r\n" in told
    assert b"The server is shutting down." in told


def test_a_base_checkpoint_refuses_chat_and_completes_text_until_ctrl_c(base_checkpoint: Path) -> None:
    with running(base_checkpoint) as server:
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
        refused = httpx.post(f"{server.url}/chat/completions", json=chat)
        assert refused.status_code == 400
        assert "/v1/completions" in refused.json()["error"]["message"]
        _end_amid_a_stream(server, signal.SIGINT)


def _end_amid_a_stream(server: Server, how: signal.Signals) -> None:
    """A signal while a stream runs: it is told to its end, the code is 0, and no process is left."""
    engine = server.engine_id
    body = {"model": MODEL, "prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        os.kill(engine, how)  # as where the whole group gets it
        server.process.send_signal(how)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    code, rest = server.wait()
    assert code == 0, rest
    assert "Traceback" not in rest
    assert not Path(f"/proc/{engine}").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_engine_process_is_still_importing_ends_both_without_a_traceback(
    tiny_checkpoint: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "ernie_serve", "serve", str(tiny_checkpoint), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)  # Python is up, torch is not
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does it
    else:
        process.send_signal(number)  # as a supervisor does it
    _, said = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode in ((0, 130) if number == signal.SIGINT else (0,)), said
    assert "Traceback" not in said
    assert not Path(f"/proc/{found[0]}").exists(), "the engine"


def test_a_start_that_waits_for_the_hub_ends_at_the_first_signal(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        environ = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        environ.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-m", "ernie_serve", "serve", "some/model", "--port", "0"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environ)
        silent.settimeout(DEADLINE_SECONDS)
        connection, _ = silent.accept()
        with connection:
            process.terminate()
            assert process.wait(10) == -signal.SIGTERM


def test_ctrl_c_while_modules_are_loaded_is_neither_lost_nor_shown_with_its_traceback() -> None:
    """As a library's callback may lose it: what is raised while `cli` is imported is dropped."""
    script = """
import os, signal, sys, time
class Loads:
    def find_spec(self, name, path=None, target=None):
        if name == "ernie_serve.cli":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                pass
sys.meta_path.insert(0, Loads())
sys.argv = ["ernie-serve", "--help"]
from ernie_serve.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_server_that_was_started_with_its_standard_files_closed_ends_with_0(tiny_checkpoint: Path) -> None:
    shell = 'exec "$@" <&- >&-'
    command = [
        "sh",
        "-c",
        shell,
        "sh",
        sys.executable,
        "-m",
        "ernie_serve",
        "serve",
        str(tiny_checkpoint),
        "--port",
        "0",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any("Try it" in line for line in process.stderr)
    held = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (0, 1)]
    process.terminate()
    _, said = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, said
    assert held == [os.devnull, os.devnull]


def test_a_killed_engine_ends_its_streams_and_the_server_with_a_reason(tiny_checkpoint: Path) -> None:
    with running(tiny_checkpoint) as server:
        body = {"model": MODEL, "prompt": "x", "max_tokens": 10_000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.engine_id, signal.SIGKILL)
            told = [line for line in lines if line]
        assert "data: [DONE]" not in told
        assert json.loads(told[-1].removeprefix("data: "))["error"]["type"] == "server_error"
        code, rest = server.wait()
        assert code == 1
        assert "signal 9" in rest


def test_an_engine_whose_server_is_killed_ends_too(tiny_checkpoint: Path) -> None:
    with running(tiny_checkpoint) as server:
        engine = Path(f"/proc/{server.engine_id}")
        server.process.kill()
        server.process.wait()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while engine.exists() and "Z" not in (engine / "stat").read_text().split()[2]:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_broken_checkpoint_ends_in_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    command = [sys.executable, "-m", "ernie_serve", "serve", str(folder), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(server: Server, tiny_checkpoint: Path) -> None:
    port = server.root.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "ernie_serve", "serve", str(tiny_checkpoint), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert done.returncode == 1
    assert "--port" in done.stderr


def test_each_key_is_asked_for_and_finds_only_what_it_cached_itself(tiny_checkpoint: Path) -> None:
    """Cached tokens show in the usage and in the time to answer; neither may tell one account of another's prompts."""
    body = {"model": MODEL, "prompt": "the same long beginning " * 8, "max_tokens": 1, "cache_salt": "guess"}
    with running(tiny_checkpoint, "--api-key", "sk-a", "--api-key", "sk-b") as server:

        def ask(key: str) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}", "host": "a.proxy.example"}
            return httpx.post(f"{server.url}/completions", json=body, headers=headers, timeout=DEADLINE_SECONDS)

        def cached(key: str) -> int:
            return int(ask(key).json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert ask("sk-wrong").status_code == 401
        assert [cached("sk-a"), cached("sk-b")] == [0, 0]
        assert cached("sk-a") > 0
        code, rest = server.end()
        assert code == 0
        assert not any(key in "".join(server.lines) + rest for key in ("sk-a", "sk-b"))


def test_a_page_that_gives_its_name_the_address_of_this_machine_may_not_call(server: Server) -> None:
    page = {"host": "evil.example:8000", "origin": "http://evil.example:8000"}
    assert httpx.get(f"{server.url}/models", headers=page).json()["error"]["code"] == "host_not_served"
    assert httpx.get(f"{server.url}/models", headers={"host": "localhost:8000"}).status_code == 200


def test_what_is_no_http_is_counted_like_every_answer(server: Server) -> None:
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 0), timeout=DEADLINE_SECONDS) as client:
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert 'ernie_serve_http_requests_total{path="other",status="400"} 1.0' in httpx.get(f"{server.root}/metrics").text


def test_on_a_cpu_the_api_steps_back_for_the_engine(server: Server) -> None:
    assert os.getpriority(os.PRIO_PROCESS, server.process.pid) >= os.getpriority(os.PRIO_PROCESS, server.engine_id) + 5
