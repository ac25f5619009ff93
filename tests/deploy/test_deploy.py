"""The compose file, the unit and the image's settings name only what exists, and agree with each other."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from served import running

from ernie_serve import config
from ernie_serve.api.auth import PUBLIC_PATHS
from ernie_serve.config import Settings

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
UNIT = (ROOT / "deploy/ernie-serve.service").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text(encoding="utf-8"))
SERVICE = COMPOSE["services"]["ernie"]
FLAGS = {config.flag_name(name) for name in Settings.model_fields} | {"--config"}
NAMES = {config.env_name(name) for name in Settings.model_fields}


def unit(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", UNIT, re.MULTILINE)


def image_environment() -> dict[str, str]:
    block = re.search(r"^ENV PATH.*?[^\\]$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert block
    return dict(re.findall(r"([A-Z_]+)=(\S+)", block[0]))


def image_volumes() -> set[str]:
    (volumes,) = re.findall(r"^VOLUME \[(.*)\]$", DOCKERFILE, re.MULTILINE)
    return set(re.findall(r'"([^"]+)"', volumes))


def commands() -> list[list[str]]:
    (cmd,) = re.findall(r"^CMD \[(.*)\]$", DOCKERFILE, re.MULTILINE)
    (start,) = unit("ExecStart")
    return [re.findall(r'"([^"]+)"', cmd), SERVICE["command"], shlex.split(start)[1:]]


@pytest.mark.parametrize("words", commands())
def test_every_command_serves_a_preset_that_exists_with_flags_that_exist(words: list[str]) -> None:
    assert words[0] == "serve"
    assert {word for word in words if word.startswith("--")} <= FLAGS
    file = ROOT / words[words.index("--config") + 1]
    flags = {word[2:].replace("-", "_"): words[at + 1] for at, word in enumerate(words) if word.startswith("--")}
    flags.pop("config")
    settings, _ = config.load(flags, config=file, environ={})
    assert settings.model == "baidu/ERNIE-4.5-21B-A3B-PT"


@pytest.mark.parametrize("text", [DOCKERFILE, UNIT, (ROOT / "deploy/compose.yaml").read_text(encoding="utf-8")])
def test_every_environment_name_is_one_of_a_setting(text: str) -> None:
    assert set(re.findall(r"ERNIE_SERVE_[A-Z_]+", text)) <= NAMES


def test_a_manager_waits_longer_than_the_server_does() -> None:
    _, compose, systemd = commands()
    assert int(SERVICE["stop_grace_period"].removesuffix("s")) > int(compose[compose.index("--shutdown-timeout") + 1])
    assert int(unit("TimeoutStopSec")[0]) > int(systemd[systemd.index("--shutdown-timeout") + 1])


def test_a_pod_is_probed_where_there_is_a_path_and_waits_longer_than_the_server_does() -> None:
    text = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    block = re.search(r"^## Kubernetes$.*?^```yaml$(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert block
    spec = yaml.safe_load(block[1])["spec"]
    (container,) = spec["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    for probe, path in (("livenessProbe", "/health/live"), ("readinessProbe", "/health/ready")):
        asked = container[probe]["httpGet"]
        assert asked["path"] == path
        assert path in PUBLIC_PATHS
        assert str(ports[asked["port"]]) == image_environment()["ERNIE_SERVE_PORT"]
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    assert spec["terminationGracePeriodSeconds"] >= int(seconds) + Settings().shutdown_timeout + 20
    assert {each["mountPath"] for each in container["volumeMounts"]} == image_volumes()


def test_what_must_stay_lies_on_a_volume() -> None:
    environ, volumes = image_environment(), image_volumes()
    assert {each.split(":")[1] for each in SERVICE["volumes"]} == volumes
    assert set(COMPOSE["volumes"]) == {each.split(":")[0] for each in SERVICE["volumes"]}
    for name in ("HF_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        assert environ[name] in volumes
    for name in ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        assert environ[name].startswith(environ["XDG_CACHE_HOME"] + "/")


def test_the_unit_keeps_its_files_where_the_image_does() -> None:
    environ = dict(each.split("=", 1) for each in unit("Environment"))
    ours = {name: value for name, value in image_environment().items() if name in environ}
    assert ours == environ
    state, cache = Path("/var/lib") / unit("StateDirectory")[0], Path("/var/cache") / unit("CacheDirectory")[0]
    for name in ("HF_HOME", "XDG_DATA_HOME"):
        assert Path(environ[name]).is_relative_to(state)
    assert environ["XDG_CACHE_HOME"] == str(cache)


def test_the_unit_brings_the_driver_up_as_root_and_starts_where_there_is_none() -> None:
    prefixes, programs = zip(*(re.findall(r"^([-+]+)(\S+)", each)[0] for each in unit("ExecStartPre")), strict=True)
    assert programs == ("/usr/bin/nvidia-modprobe", "/usr/bin/nvidia-smi")
    assert all(set(each) == {"-", "+"} for each in prefixes)
    assert not unit("DeviceAllow")
    assert not unit("PrivateDevices")


def test_the_image_runs_the_server_itself_and_not_as_root() -> None:
    assert re.search(r'^ENTRYPOINT \["ernie-serve"\]$', DOCKERFILE, re.MULTILINE)
    (user,) = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert user == "10001:10001"


def test_what_the_image_copies_is_let_through() -> None:
    let = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    copied = {word for line in re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()}
    assert copied == let
    assert all((ROOT / name).exists() for name in let)


def test_the_images_health_check_finds_a_server_whose_port_is_a_flag(tmp_path: Path) -> None:
    (words,) = re.findall(r"^HEALTHCHECK .*\\\n *CMD (.*)$", DOCKERFILE, re.MULTILINE)
    check = [sys.executable, *json.loads(words)[1:]]
    environ = {"ERNIE_SERVE_ADDRESS_FILE": str(tmp_path / "url"), "ERNIE_SERVE_PORT": "9"}

    def is_healthy() -> bool:
        proxied = os.environ | environ | {"http_proxy": "http://127.0.0.1:9"}
        return subprocess.run(check, env=proxied, stderr=subprocess.DEVNULL, timeout=60).returncode == 0

    assert not is_healthy()
    with running(None, **environ) as server:  # which gives it --port 0
        assert is_healthy()
        server.end()
        assert not is_healthy()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    """With a program that is there: the one of the unit is on the machine that it is installed on."""
    file = tmp_path / "ernie-serve.service"
    file.write_text(UNIT.replace("ExecStart=/opt/ernie-serve/.venv/bin/ernie-serve", "ExecStart=/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"SYSTEMD_LOG_LEVEL": "warning"},
    )
    assert done.returncode == 0, done.stderr
    assert "ernie-serve.service" not in done.stderr, done.stderr


def test_what_the_page_says_of_the_files_is_so() -> None:
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    assert image_volumes() <= set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))
    arguments = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    assert all(f"`{name}`" in page for name in arguments)
    for path in [*re.findall(r"\]\(\.\./([^)]+)\)", page), *re.findall(r"(configs/[\w.-]+\.toml)", page)]:
        assert (ROOT / path).exists(), path
