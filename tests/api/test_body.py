import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import Request

from ernie_serve.api.body import MAX_DEPTH, deeper_than, parse_object, read_body
from ernie_serve.api.connection import ClientLeft
from ernie_serve.api.services import Limits
from ernie_serve.errors import InvalidRequest, RequestTimeout, RequestTooLarge

JSON = {"content-type": "application/json"}


def padded(size: int) -> bytes:
    """A valid request of exactly this many bytes."""
    body = json.dumps({"model": "ernie", "prompt": "a", "user": ""}).encode()
    return body[:-2] + b"u" * (size - len(body)) + body[-2:]


async def in_parts(body: bytes) -> AsyncIterator[bytes]:
    """Sent without a length, as a stream."""
    for start in range(0, len(body), 1000):
        yield body[start : start + 1000]


@pytest.mark.parametrize("declared", [True, False])
def test_body_may_have_the_limit_and_not_a_byte_more(call_with: Any, declared: bool) -> None:
    call = call_with(limits=Limits(max_body_bytes=5000))
    for size, status in ((5000, 200), (5001, 413)):
        content = padded(size) if declared else in_parts(padded(size))
        response = call("POST", "/v1/completions", content=content, headers=JSON)
        assert response.status_code == status
    assert response.json()["error"]["code"] == "request_too_large"
    assert "5000" in response.json()["error"]["message"]


def test_the_usual_limit_is_eight_mebibytes(call: Any) -> None:
    limit = 8 * 1024 * 1024
    assert call("POST", "/v1/completions", content=padded(limit), headers=JSON).status_code == 200
    assert call("POST", "/v1/completions", content=padded(limit + 1), headers=JSON).status_code == 413


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd"])
def test_compressed_body_is_refused(call: Any, encoding: str) -> None:
    content = gzip.compress(padded(100))
    response = call("POST", "/v1/completions", content=content, headers={**JSON, "content-encoding": encoding})
    assert response.status_code == 415
    assert "Content-Encoding" in response.json()["error"]["message"]


@pytest.mark.parametrize("media", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_by_any_spelling_is_read(call: Any, media: str) -> None:
    headers = {"content-type": media, "content-encoding": "identity"}
    assert call("POST", "/v1/completions", content=padded(100), headers=headers).status_code == 200


MALFORMED = [
    b"",
    b"{",
    b"nonsense",
    b"null",
    b'"text"',
    b"[]",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"model": NaN}',
    b'{"model": Infinity}',
    b'{"model": 1e400}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "a\x00b"}',
    b'\xef\xbb\xbf{"model": "ernie"}',
    json.dumps({"prompt": "a"}).encode("utf-16"),
]


@pytest.mark.parametrize("content", MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_no_json_object_is_a_400(call: Any, content: bytes) -> None:
    response = call("POST", "/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_escaped_nul_and_surrogate_pairs_are_text() -> None:
    assert parse_object(b'{"prompt": "a\\u0000b\\ud83d\\ude00"}') == {"prompt": "a\0b\U0001f600"}


def test_depth_is_bounded() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    parse_object(nested(MAX_DEPTH))
    with pytest.raises(InvalidRequest, match=str(MAX_DEPTH)):
        parse_object(nested(MAX_DEPTH + 1))


def test_depth_counts_objects_and_lists() -> None:
    assert not deeper_than({"a": [{"b": 1}]}, 3)
    assert deeper_than({"a": [{"b": []}]}, 3)


def test_body_that_does_not_arrive_times_out(fast_limits: Limits) -> None:
    async def stalled() -> Any:
        await asyncio.Event().wait()

    with pytest.raises(RequestTimeout, match=r"0\.05 seconds"):
        asyncio.run(read_body(Request(scope(), stalled), fast_limits))


def test_client_that_leaves_while_it_sends_is_noticed() -> None:
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    with pytest.raises(ClientLeft):
        asyncio.run(read_body(Request(scope(), receive), Limits()))


def test_declared_length_is_refused_before_a_byte_is_read() -> None:
    async def receive() -> Any:
        raise AssertionError("nothing is to be read")

    with pytest.raises(RequestTooLarge):
        asyncio.run(read_body(Request(scope((b"content-length", b"9" * 20)), receive), Limits()))


def scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "headers": [(b"content-type", b"application/json"), *headers]}
