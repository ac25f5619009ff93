"""Folders are found, and models fetched from a small fake hub, as the environment says.

huggingface_hub reads its environment once, so most tests ask in a process of their own.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from errno import ENOSPC
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from ernie_serve.bundled import ERNIE_TINY
from ernie_serve.errors import CheckpointError, SettingsError
from ernie_serve.model import download, hub

COMMIT, OLD_COMMIT = "a" * 40, "b" * 40
FILES = {
    "config.json": b'{"model_type": "ernie4_5"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"hello",
    "tokenizer.model": b"spm",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 5000,
    "model-00002-of-00002.safetensors": b"rest",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"raise SystemExit",
    "original/model.safetensors": b"other",
}

ASK = """
import json, sys
from ernie_serve.errors import CheckpointError
from ernie_serve.model.hub import resolve
heard = []
try:
    folder = resolve(*json.loads(sys.argv[1]), progress=lambda *share: heard.append(share))
    print(json.dumps({"folder": str(folder), "heard": heard, "torch": "torch" in sys.modules}))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""


@dataclass
class FakeHub:
    """One model, baidu/ernie, at two revisions; a gated one; and nothing else."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    token: str | None = None
    status: int = 200
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)

    def answer(self, method: str, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        self.seen.append((method, path, token))
        if self.status != 200:
            return self.status, {}, b"{}"
        match path.removeprefix("/api/models/").split("/"):
            case ["baidu", "gated", *_]:
                return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b"{}"
            case ["baidu", "ernie", "revision", revision]:
                commit = {"main": COMMIT, "v1": OLD_COMMIT}.get(revision)
                if self.token and token != f"Bearer {self.token}":
                    return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
                if commit is None:
                    return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
                info = {"id": "baidu/ernie", "sha": commit, "siblings": [{"rfilename": name} for name in self.files]}
                return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
            case ["baidu", "ernie", "tree", _]:
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in self.files.items()
                ]
                return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
            case ["", "baidu", "ernie", "resolve", commit, *name] if "/".join(name) in self.files:
                data = self.files["/".join(name)]
                return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}, data
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    @property
    def fetched(self) -> set[str]:
        """Names of the files whose contents were sent."""
        return {
            path.split("/resolve/")[1][41:] for method, path, _ in self.seen if method == "GET" and "/resolve/" in path
        }


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    fake = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            status, headers, body = fake.answer(self.command, path, self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815  # the name that http.server calls

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def ask(fake: FakeHub, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Resolve a model in a new process with this environment."""

    def ask(model: str, revision: str | None = None, what: str = "all", **environment: str) -> dict[str, Any]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {"HF_ENDPOINT": fake.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"} | environment
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", ASK, json.dumps([model, revision, what])],
            env=kept | settings,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return ask


def test_a_local_folder_is_used_as_it_is(tmp_path: Path) -> None:
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_a_folder_in_the_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert hub.resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize("model", ["", "ernie-tiny"])
def test_the_bundled_model_needs_no_folder(model: str) -> None:
    assert hub.resolve(model) == ERNIE_TINY
    with pytest.raises(CheckpointError, match=f"{ERNIE_TINY} is a local folder, which has no revision 'v1'"):
        hub.resolve(model, revision="v1")


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.gguf is a file; name the folder"):
        hub.resolve(str(tmp_path / "model.gguf"))


def test_a_name_that_is_too_long_is_told() -> None:
    with pytest.raises(CheckpointError, match=r"x{80} cannot be looked for: File name too long"):
        hub.resolve("x" * 300)


def test_a_home_that_is_nobody_s_is_told() -> None:
    with pytest.raises(SettingsError, match="MODEL ~nobodyhere/model: ~nobodyhere is nobody's home here"):
        hub.resolve("~nobodyhere/model")


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "~/nowhere", "a/b/c", "C:\\models\\ernie"])
def test_a_path_that_is_no_folder_is_not_asked_of_the_hub(model: str) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        hub.resolve(model)


def test_a_local_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no revision 'v1'"):
        hub.resolve(str(tmp_path), revision="v1")


@pytest.mark.parametrize("model", ["a b", "name--with", "x" * 200, "-ernie"])
def test_a_name_that_the_hub_cannot_have_is_refused(model: str) -> None:
    with pytest.raises(CheckpointError, match="nor a name that a model on the hub can have"):
        hub.resolve(model)


def test_data_is_downloaded_and_code_is_not(fake: FakeHub, ask: Callable[..., dict[str, Any]]) -> None:
    answer = ask("baidu/ernie")
    wanted = {
        name for name in FILES if name.endswith((".json", ".jinja", ".model", ".safetensors")) and "/" not in name
    }
    folder = Path(answer["folder"])
    assert folder.name == COMMIT
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: FILES[name] for name in wanted}
    assert fake.fetched == wanted


def test_the_text_part_comes_without_weights_and_without_torch(
    fake: FakeHub, ask: Callable[..., dict[str, Any]]
) -> None:
    answer = ask("baidu/ernie", what="text")
    assert not any(name.endswith(".safetensors") for name in fake.fetched)
    assert "tokenizer.json" in fake.fetched
    assert answer["torch"] is False


def test_progress_of_a_download_only_grows_and_ends_at_one(ask: Callable[..., dict[str, Any]]) -> None:
    heard = ask("baidu/ernie")["heard"]
    shares = [share for share, _ in heard]
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0
    assert {what for _, what in heard} == {"downloading baidu/ernie"}


def test_a_revision_is_a_folder_of_its_own(ask: Callable[..., dict[str, Any]]) -> None:
    assert Path(ask("baidu/ernie", revision="v1")["folder"]).name == OLD_COMMIT


def test_an_unknown_revision_is_named(ask: Callable[..., dict[str, Any]]) -> None:
    assert ask("baidu/ernie", revision="v9") == {"error": "baidu/ernie has no revision 'v9' on the hub."}


def test_what_is_cached_is_not_fetched_again(fake: FakeHub, ask: Callable[..., dict[str, Any]]) -> None:
    first = ask("baidu/ernie")["folder"]
    fake.seen.clear()
    again = ask("baidu/ernie")
    assert again["folder"] == first
    assert again["heard"] == []
    assert not fake.fetched


def test_offline_finds_the_cache_and_asks_nobody(fake: FakeHub, ask: Callable[..., dict[str, Any]]) -> None:
    first = ask("baidu/ernie")["folder"]
    fake.seen.clear()
    assert ask("baidu/ernie", HF_HUB_OFFLINE="1")["folder"] == first
    assert not fake.seen


def test_offline_without_the_cache_says_so(fake: FakeHub, ask: Callable[..., dict[str, Any]]) -> None:
    assert "HF_HUB_OFFLINE forbids" in ask("baidu/ernie", HF_HUB_OFFLINE="1")["error"]
    assert not fake.seen


def test_offline_with_only_the_text_cached_says_so(ask: Callable[..., dict[str, Any]]) -> None:
    ask("baidu/ernie", what="text")
    assert "folder" in ask("baidu/ernie", what="text", HF_HUB_OFFLINE="1")
    assert "not wholly" in ask("baidu/ernie", HF_HUB_OFFLINE="1")["error"]


def test_the_cache_serves_when_the_hub_is_down(fake: FakeHub, ask: Callable[..., dict[str, Any]]) -> None:
    first = ask("baidu/ernie")["folder"]
    assert ask("baidu/ernie", HF_ENDPOINT=nobody())["folder"] == first


def test_no_network_and_no_cache_says_both(ask: Callable[..., dict[str, Any]]) -> None:
    endpoint = nobody()
    error = ask("baidu/ernie", HF_ENDPOINT=endpoint)["error"]
    assert f"not wholly in the cache, and {endpoint} cannot be reached" in error


def test_the_token_is_sent(fake: FakeHub, ask: Callable[..., dict[str, Any]]) -> None:
    fake.token = "hf_secret"
    assert "folder" in ask("baidu/ernie", HF_TOKEN="hf_secret")
    assert {token for _, path, token in fake.seen if "/baidu/ernie/" in path} == {"Bearer hf_secret"}


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_a_private_model_asks_for_a_token(token: str, fake: FakeHub, ask: Callable[..., dict[str, Any]]) -> None:
    fake.token = "hf_secret"
    error = ask("baidu/ernie", HF_TOKEN=token)["error"]
    assert "set HF_TOKEN" in error
    assert "hf_" not in error.replace("HF_TOKEN", "")


def test_a_gated_model_says_where_to_accept_its_terms(fake: FakeHub, ask: Callable[..., dict[str, Any]]) -> None:
    assert f"is gated. Accept its terms at {fake.url}/baidu/gated" in ask("baidu/gated")["error"]


def test_a_model_that_nobody_knows_is_neither_folder_nor_on_the_hub(ask: Callable[..., dict[str, Any]]) -> None:
    assert "baidu/unknown is neither a local folder nor a model on" in ask("baidu/unknown")["error"]


def test_who_may_have_meant_the_bundled_model_is_told_its_name(ask: Callable[..., dict[str, Any]]) -> None:
    assert ask("ernie-small", HF_HUB_OFFLINE="1")["error"].endswith("The model that is bundled is called ernie-tiny.")
    assert "bundled" not in ask("baidu/unknown", HF_HUB_OFFLINE="1")["error"]


@pytest.mark.parametrize(("status", "message"), [(403, "refuses baidu/ernie (403)"), (500, "500")])
def test_a_hub_that_answers_with_an_error_is_quoted(
    status: int, message: str, fake: FakeHub, ask: Callable[..., dict[str, Any]]
) -> None:
    fake.status = status
    assert message in ask("baidu/ernie")["error"]


def test_a_model_without_safetensors_is_refused(fake: FakeHub, ask: Callable[..., dict[str, Any]]) -> None:
    fake.files = {name: data for name, data in FILES.items() if not name.endswith(".safetensors")}
    assert "on the hub has no .safetensors file" in ask("baidu/ernie")["error"]
    assert "pytorch_model.bin" not in fake.fetched


def test_a_disk_that_is_too_small_is_known_before_the_download(
    fake: FakeHub, ask: Callable[..., dict[str, Any]]
) -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return 10**17

    fake.files["model-00003-of-00003.safetensors"] = Huge(b"")
    assert "needs 100000000.0 GB" in ask("baidu/ernie")["error"]
    assert not fake.fetched


def test_a_disk_that_fills_up_is_said_to_be_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> str:
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "snapshot_download", full)
    with pytest.raises(CheckpointError, match=r"The disk of .* is full"):
        hub.resolve("baidu/ernie")


def nobody() -> str:
    """An address on which nobody listens."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{port.getsockname()[1]}"
