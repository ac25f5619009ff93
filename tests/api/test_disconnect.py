"""A client that leaves frees the engine, whatever it was waiting for."""

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from ernie_serve.api.app import create_app
from ernie_serve.api.services import Limits


@pytest.fixture
def url(serve: Any, services: Any) -> str:
    return str(serve(create_app(services)))


def post(url: str, **fields: Any) -> socket.socket:
    """Send a request and leave the connection open."""
    body = json.dumps({"model": "ernie", "prompt": "Hi", **fields}).encode()
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=10)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hang_after", [0, 3])  # before the first token, and after some
@pytest.mark.parametrize("n", [1, 2])
def test_client_that_leaves_ends_its_requests(url: str, engine: Any, stream: bool, hang_after: int, n: int) -> None:
    engine.hang_after = hang_after
    connection = post(url, stream=stream, n=n)
    assert engine.begun.wait(10)
    assert not engine.idle.is_set()
    connection.close()
    assert engine.idle.wait(10)
    assert len(engine.left) == n


def test_client_that_leaves_ends_nobody_elses_request(url: str, engine: Any) -> None:
    engine.hang_after = 3
    staying, leaving = post(url, stream=True), post(url, stream=True)
    for connection in (staying, leaving):
        assert connection.recv(12) == b"HTTP/1.1 200"
    leaving.close()
    assert engine.someone_left.wait(10)
    assert (len(engine.left), len(engine.running)) == (1, 1)
    staying.close()
    assert engine.idle.wait(10)


def test_client_that_stops_reading_is_left(serve: Any, make_services: Any, engine: Any) -> None:
    engine.reply = "x" * 50_000
    limits = Limits(ping_seconds=0.1, stall_seconds=0.4)
    url = serve(create_app(make_services(limits=limits, max_model_len=100_000)))
    connection = post(url, stream=True, max_tokens=50_000, logprobs=5)
    assert engine.idle.wait(20)
    assert len(engine.left) == 1
    assert engine.num_made < 50_000
    connection.close()
