"""Holds a built image to what docs/deploy.md says of it, as scripts/test_image does. Usage: check_image.py IMAGE

Knows buildah, curl and the OpenAI SDK. Knows nothing of how the image was built.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai

KEY = "sk-for-this-check"
MODEL = "ernie-tiny"
ANSWER = 400
SECONDS = 300
PATIENT = ("--shutdown-timeout", "240")
"""However slow the machine is, what a drain is asked for is within its limit."""


class Container:
    """A container of the image in which commands run as the image says: its user, environment and folder."""

    def __init__(self, image: str) -> None:
        self.config: dict[str, Any] = json.loads(_output("buildah", "inspect", "--type", "image", image))["Docker"][
            "config"
        ]
        self.name = _output("buildah", "from", image).strip()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.root = f"http://127.0.0.1:{self.port}"

    def command(self, *command: str) -> list[str]:
        environ = {"ERNIE_SERVE_PORT": self.port, "ERNIE_SERVE_HOST": "127.0.0.1", "ERNIE_SERVE_API_KEY": KEY}
        flags = [part for name, value in environ.items() for part in ("--env", f"{name}={value}")]
        return ["buildah", "run", *flags, self.name, "--", *command]

    def rc(self, *command: str) -> int:
        return subprocess.run(self.command(*command), capture_output=True).returncode

    def output(self, *command: str) -> str:
        return _output(*self.command(*command))


def main(image: str) -> None:
    container = Container(image)
    check_settings(container)
    check_files(container)
    server = subprocess.Popen(container.command(*container.config["Entrypoint"], "serve", *PATIENT))
    try:
        process_id = wait_until_ready(container, server)
        check_user(process_id)
        check_health(container)
        check_curl(container)
        check_sdk(container)
        check_drain(container, server, process_id)
    finally:
        for each in _server_processes(server.pid):
            os.kill(each, signal.SIGKILL)
        server.kill()
        server.wait()


def check_settings(container: Container) -> None:
    config = container.config
    assert config["User"] == "10001:10001", config["User"]
    assert config["Entrypoint"] == ["ernie-serve"], "a shell would stand between the server and SIGTERM"
    assert config["Cmd"] == ["serve", "--config", "configs/ernie-4.5-21b-a3b.toml"]
    assert "8000/tcp" in config["ExposedPorts"]
    assert "ERNIE_SERVE_HOST=0.0.0.0" in config["Env"]
    environ = dict(each.split("=", 1) for each in config["Env"])
    for name in ("HF_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        assert environ[name] in config["Volumes"], f"{name} is on no volume"
    assert environ["TRITON_CACHE_DIR"].startswith(environ["XDG_CACHE_HOME"] + "/")
    _say("settings")


def check_files(container: Container) -> None:
    assert container.output("id", "-u").strip() == "10001"
    for folder in ("HF_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        assert container.rc("sh", "-c", f'touch "${folder}/written" && rm "${folder}/written"') == 0, folder
    assert container.rc("touch", "/opt/ernie-serve/written") != 0, "the program can be overwritten by its own user"
    assert container.rc("test", "-s", "/srv/ernie-serve/configs/ernie-4.5-21b-a3b.toml") == 0
    found = "import sysconfig, os; print(os.path.exists(sysconfig.get_path('include') + '/Python.h'))"
    assert container.output("python", "-c", found).strip() == "True", "Triton compiles against Python.h"
    assert container.rc("g++", "--version") == container.rc("ninja", "--version") == 0
    settings = container.output("sh", "-c", "find / -xdev -name pip.conf -size +0 2>/dev/null || true")
    assert not settings.strip(), f"pip's settings of the building machine are left: {settings}"
    assert container.rc("test", "-e", "/src") != 0, "the source tree of the build stage is left"
    _say("files")


def wait_until_ready(container: Container, server: "subprocess.Popen[bytes]") -> int:
    """The id of the server's process, once it answers."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            if httpx.get(f"{container.root}/health/ready").status_code == 200:
                return _server_processes(server.pid)[0]
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError("the server did not get ready")


def check_user(process_id: int) -> None:
    status = Path(f"/proc/{process_id}/status").read_text()
    user = next(line.split() for line in status.splitlines() if line.startswith("Uid:"))
    assert set(user[1:]) == {"10001"}, user
    _say("user")


def check_health(container: Container) -> None:
    kind, *command = container.config["Healthcheck"]["Test"]
    assert kind == "CMD", kind
    assert container.rc(*command) == 0, "a server that lives is called dead"
    assert container.rc("env", "ERNIE_SERVE_ADDRESS_FILE=/nowhere", *command) != 0, (
        "a server that is not there is called healthy"
    )
    _say("healthcheck")


def check_curl(container: Container) -> None:
    body = {"model": MODEL, "prompt": "Large language model is", "max_tokens": 16, "temperature": 0}
    url = f"{container.root}/v1/completions"
    head = ["curl", "-sSN", "--fail", url, "-H", "content-type: application/json"]
    whole = json.loads(_output(*head, "-H", f"authorization: Bearer {KEY}", "-d", json.dumps(body)))["choices"][0][
        "text"
    ]
    lines = _output(*head, "-H", f"authorization: Bearer {KEY}", "-d", json.dumps(body | {"stream": True})).splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    assert whole
    assert whole == "".join(json.loads(each)["choices"][0]["text"] for each in data)
    refused = subprocess.run([*head, "-d", json.dumps(body)], capture_output=True, text=True)
    assert "401" in refused.stderr, "a request without a key was let in"
    _say("curl")


def check_sdk(container: Container) -> None:
    with openai.OpenAI(base_url=f"{container.root}/v1", api_key=KEY) as client:
        ask: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
        whole = client.chat.completions.create(**ask).choices[0].message.content
        chunks = client.chat.completions.create(**ask, stream=True)
        assert whole
        assert whole == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    _say("SDK")


def check_drain(container: Container, server: "subprocess.Popen[bytes]", process_id: int) -> None:
    """SIGTERM while an answer streams: the answer comes whole, and the server ends with 0."""
    with openai.OpenAI(base_url=f"{container.root}/v1", api_key=KEY) as client:
        stream = client.completions.create(
            model=MODEL,
            prompt="Once",
            max_tokens=ANSWER,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        usage = None
        for index, chunk in enumerate(stream):
            if index == 3:
                os.kill(process_id, signal.SIGTERM)
            usage = chunk.usage or usage
        assert usage is not None
        assert usage.completion_tokens == ANSWER
    assert server.wait(SECONDS) == 0, server.returncode
    _say("drain")


def _server_processes(parent: int) -> list[int]:
    """The processes below `parent` that are the server itself, not its engine nor buildah's."""
    found, seen = [], [parent]
    while seen:
        each = Path(f"/proc/{seen.pop()}")
        try:
            words = (each / "cmdline").read_bytes().split(b"\0")
            children = [
                int(child) for task in (each / "task").iterdir() for child in (task / "children").read_text().split()
            ]
        except OSError:
            continue
        if b"python" in words[0] and words[1:3] == [b"/opt/ernie-serve/bin/ernie-serve", b"serve"]:
            found.append(int(each.name))
        seen += children
    return found


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=SECONDS).stdout


def _say(what: str) -> None:
    print(f"   {what}: as it should be", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
