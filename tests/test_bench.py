"""What ends a measurement before, or instead of, its results."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from command import Run

TOKEN = b'data: {"choices": [{"text": "a"}]}\n\n'


@pytest.fixture
def run(run_command: Run) -> Run:
    """Run a small benchmark with more flags; the exit code, and what went to both outputs."""
    return lambda *flags: run_command(
        "bench", "--max-concurrency", "2", "--input-len", "4", "--output-len", "2", *flags
    )


class Scripted(ThreadingHTTPServer):
    """A server that gives `answers` one after the other, and then the last again and again."""

    answers: list[tuple[int, bytes]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: object) -> None:
        """Nothing: a client may leave once it has seen enough."""


class Answer(BaseHTTPRequestHandler):
    server: Scripted

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        answers = self.server.answers
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Scripted]:
    """A server whose answers a test sets."""
    with Scripted(("127.0.0.1", 0), Answer) as found:
        thread = Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def refusal(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()


def told_in_a_line(done: tuple[int, str, str]) -> str:
    code, out, err = done
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    return err


def test_a_server_is_measured_and_the_results_are_written(run: Run, server: Scripted, tmp_path: Path) -> None:
    server.answers = [(200, TOKEN * 2)]
    path = tmp_path / "results.json"
    code, out, err = run("--base-url", server.url, "--output-json", str(path))
    assert (code, err) == (0, "")
    assert "http" in out
    (result,) = json.loads(path.read_text())["results"]
    assert (result["requests"], result["decode_tok_s"]) == (4, None), "in two waves no moment has all decode"


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (400, "--input-len, --output-len and --vocab-size"),
        (401, "--api-key, or to ERNIE_SERVE_API_KEY"),
        (404, "MODEL is the name of its model"),
        (429, "less to --max-concurrency"),
        (500, "Its log may say more"),
    ],
)
@pytest.mark.parametrize("num_good", [0, 2])
def test_a_refusal_is_told_with_the_server_s_words(
    run: Run, server: Scripted, status: int, remedy: str, num_good: int
) -> None:
    server.answers = [(200, TOKEN)] * num_good + [(status, refusal("No,\nthis is [wrong]."))]
    err = told_in_a_line(run("--base-url", server.url))
    assert f"{server.url} answered {status}: No, this is [wrong]. " in err
    assert remedy in err


def test_an_error_in_the_stream_is_told(run: Run, server: Scripted) -> None:
    server.answers = [(200, TOKEN + b"data: " + refusal("The engine ended.") + b"\n\n")]
    assert "The engine ended. Its log may say more." in told_in_a_line(run("--base-url", server.url))


@pytest.mark.parametrize(
    ("status", "told"), [(200, "answered without a token"), (502, "502: <html>Bad gateway</html>")]
)
def test_what_is_no_such_server_is_told(run: Run, server: Scripted, status: int, told: str) -> None:
    server.answers = [(status, b"<html>Bad\ngateway</html>")]
    assert told in told_in_a_line(run("--base-url", server.url))


def test_a_server_that_is_away_is_told(run: Run, server: Scripted) -> None:
    url = server.url
    server.server_close()
    assert f"The server at {url} cannot be reached" in told_in_a_line(run("--base-url", url))


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000/v1", "localhost", "ftp://a/v1", "http://", "http://a:b/v1", "http://a:80000"]
)
def test_what_is_no_address_is_told_with_an_example(run: Run, url: str) -> None:
    err = told_in_a_line(run("--base-url", url))
    assert f"--base-url is `{url}`, which is no address" in err
    assert "http://127.0.0.1:8000/v1" in err


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf"])
def test_a_rate_that_is_none_is_refused(run: Run, rate: str) -> None:
    assert "give a number above 0, or none for a closed load" in told_in_a_line(run("--request-rate", rate))


def test_results_that_could_not_be_written_are_not_measured(run: Run, server: Scripted, tmp_path: Path) -> None:
    server.answers = [(500, refusal("It was asked."))]
    for path in (tmp_path / "none" / "results.json", tmp_path):
        err = told_in_a_line(run("--base-url", server.url, "--output-json", str(path)))
        assert f"--output-json {path} cannot be written" in err
    assert "It was asked" in told_in_a_line(run("--base-url", server.url, "--output-json", str(tmp_path / "a.json")))
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_too_long_for_the_engine_is_told(run: Run) -> None:
    long = ("--max-model-len", "64", "--input-len", "100", "--kv-cache-memory-bytes", "16MiB", "--threads", "1")
    code, out, err = run("--mode", "offline", *long)
    assert (code, out) == (1, "")
    assert "The prompt has 100 tokens" in err.splitlines()[-1]
    assert "--input-len" in err.splitlines()[-1]
    assert "Traceback" not in err
