"""What a client may do to a connection, over real sockets."""

import asyncio
import json
import logging
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import uvicorn

from ernie_serve.api import protocol
from ernie_serve.api.app import create_app

PROBE = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"


def post(**fields: Any) -> bytes:
    body = json.dumps({"model": "ernie", "prompt": "Hi", "max_tokens": 9, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


class Client:
    """One connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """The status and body of an answer that says how long it is."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        return int(head.split()[1]), await self.reader.readexactly(length)


@asynccontextmanager
async def connected(services: Any, **changes: Any) -> AsyncIterator[Client]:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the server has it
    http: Any = partial(protocol.HttpProtocol, answered=services.measures.answered)
    config = uvicorn.Config(create_app(services), http=http, log_config=None, lifespan="off", **changes)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    while not server.started:  # noqa: ASYNC110  # there is no event for it
        await asyncio.sleep(0)
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    yield Client(reader, writer)
    writer.close()
    server.should_exit = True
    await serving


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("more", [PROBE, PROBE[:20], PROBE * 9])
def test_a_client_that_leaves_is_noticed_whatever_else_it_has_asked(
    services: Any, engine: Any, stream: bool, at_once: bool, more: bytes
) -> None:
    engine.hang_after = 3

    async def scenario() -> None:
        async with connected(services) as client:
            await client.say(post(stream=stream) + (more if at_once else b""))
            await asyncio.to_thread(engine.begun.wait, 20)
            if not at_once:
                await client.say(more)
            client.writer.close()
            await asyncio.to_thread(engine.someone_left.wait, 20)
            assert len(engine.left) == 1

    run(scenario())


@pytest.mark.parametrize("more", [PROBE, PROBE[:20], PROBE * 9])
def test_what_is_asked_before_the_answer_is_not_answered_and_the_connection_closed(services: Any, more: bytes) -> None:
    async def scenario() -> None:
        async with connected(services) as client:
            await client.say(post() + more)
            assert (await client.answer())[0] == 200
            assert await client.reader.read() == b""

    run(scenario())


@pytest.mark.parametrize("at_once", [False, True])
def test_a_whole_request_is_answered_whatever_comes_behind_it(services: Any, at_once: bool) -> None:
    async def scenario() -> None:
        async with connected(services) as client:
            await client.say(post() + (b"garbage\r\n\r\n" if at_once else b""))
            if not at_once:
                await client.say(b"garbage\r\n\r\n")
            assert (await client.answer())[0] == 200
            assert await client.reader.read() == b""

    run(scenario())


def test_a_body_that_is_no_http_is_told_so(services: Any) -> None:
    async def scenario() -> None:
        async with connected(services) as client:
            head, _, _ = post().partition(b"content-length")
            await client.say(head + b"transfer-encoding: chunked\r\n\r\nzz\r\n")
            status, body = await client.answer()
            assert (status, json.loads(body)["error"]["type"]) == (400, "invalid_request_error")
            assert await client.reader.read() == b""

    run(scenario())


def test_an_empty_line_after_an_answer_keeps_no_connection(services: Any) -> None:
    async def scenario() -> None:
        async with connected(services, timeout_keep_alive=1) as client:
            await client.say(PROBE)
            assert (await client.answer())[0] == 200
            await client.say(b"\r\n")
            assert await client.reader.read() == b""

    run(scenario())


def test_one_request_after_the_other_is_answered_on_one_connection(services: Any) -> None:
    async def scenario() -> None:
        async with connected(services) as client:
            for asked, status in ((post(), 200), (PROBE, 200), (post(model="no"), 404), (post(), 200)):
                await client.say(asked[:-30])
                await asyncio.sleep(0.01)  # so that it comes in two pieces, which only makes the test harder
                await client.say(asked[-30:])
                assert (await client.answer())[0] == status

    run(scenario())


def test_a_head_without_end_is_refused_and_the_connection_closed(services: Any) -> None:
    async def scenario() -> None:
        async with connected(services) as client:
            await client.say(PROBE)
            assert (await client.answer())[0] == 200
            client.writer.write(PROBE[:-2] + b"x: " + b"a" * 1_000_000)
            status, body = await client.answer()
            assert status == 431
            assert "65536 bytes" in json.loads(body)["error"]["message"]

    run(scenario())


@pytest.mark.parametrize(("size", "status"), [(65_000, 200), (66_000, 431), (131_000, 431)])
def test_a_head_that_is_too_large_is_refused_however_it_comes(services: Any, size: int, status: int) -> None:
    async def scenario() -> None:
        async with connected(services) as client:
            client.writer.write(PROBE[:-2] + b"x: " + b"a" * (size - len(PROBE) - 5) + b"\r\n\r\n")
            assert (await client.answer())[0] == status

    run(scenario())


def test_a_head_that_does_not_arrive_is_not_waited_for(services: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.05)

    async def scenario() -> None:
        async with connected(services) as client:
            await client.say(PROBE[:20])
            status, body = await client.answer()
            assert (status, json.loads(body)["error"]["type"]) == (408, "invalid_request_error")
            assert await client.reader.read() == b""

    run(scenario())


def test_a_client_that_says_nothing_is_let_go(services: Any) -> None:
    async def scenario() -> None:
        async with connected(services, timeout_keep_alive=0) as client:
            assert await client.reader.read() == b""

    run(scenario())


def test_what_is_no_http_is_told_so_like_every_error(services: Any) -> None:
    async def scenario() -> None:
        async with connected(services) as client:
            await client.say(b"\x16\x03\x01 hello\r\n\r\n")
            status, body = await client.answer()
            assert (status, json.loads(body)["error"]["type"]) == (400, "invalid_request_error")

    run(scenario())


UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"


def counted(prompt: str, wish: bytes = UPGRADE, *, chunked: bool = False, more: bytes = b"") -> bytes:
    """A request that is answered with the number of its prompt's bytes, and that wishes for another protocol."""
    body = json.dumps({"model": "ernie", "prompt": prompt}).encode()
    framing = b"content-length: %d" % len(body)
    if chunked:
        framing = b"transfer-encoding: chunked"
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:9], body[9:])) + b"0\r\n\r\n"
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + wish + more + framing
    return head + b"\r\n\r\n" + body


async def turns(number: int = 4) -> None:
    """Let the server read what was sent."""
    for _ in range(number):
        await asyncio.sleep(0)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_wish_for_another_protocol_is_passed_over_however_the_request_is_cut(services: Any, chunked: bool) -> None:
    asked = counted("four", chunked=chunked)

    async def scenario() -> None:
        async with connected(services, ws="none") as client:
            for cut in range(len(asked) + 1):
                await client.say(asked[:cut])
                await turns()
                await client.say(asked[cut:])
                status, body = await client.answer()
                assert (status, json.loads(body)["count"]) == (200, 4), cut

    run(scenario())


@pytest.mark.parametrize("chunked", [False, True])
def test_a_wish_for_another_protocol_is_passed_over_byte_by_byte(services: Any, chunked: bool) -> None:
    async def scenario() -> None:
        async with connected(services, ws="none") as client:
            for byte in counted("four", chunked=chunked):
                await client.say(bytes([byte]))
                await turns(2)
            assert json.loads((await client.answer())[1])["count"] == 4
            await client.say(PROBE)
            assert (await client.answer())[0] == 200

    run(scenario())


@pytest.mark.parametrize("size", [65_000, 200_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_behind_a_wish_for_another_protocol_may_be_large(services: Any, size: int, chunked: bool) -> None:
    services = replace(services, max_model_len=1_000_000)

    async def scenario() -> None:
        async with connected(services, ws="none") as client:
            for _ in range(2):
                await client.say(counted("a" * size, chunked=chunked))
                status, body = await client.answer()
                assert (status, json.loads(body)["count"]) == (200, size)

    run(scenario())


@pytest.mark.parametrize("at_once", [False, True])
def test_a_body_behind_a_wish_for_another_protocol_is_no_request(services: Any, at_once: bool) -> None:
    """No proxy before this server has seen that request, or judged whether it may be sent."""
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n" % (UPGRADE, len(PROBE))

    async def scenario() -> None:
        async with connected(services, ws="none") as client:
            await client.say(head + (PROBE if at_once else b""))
            if not at_once:
                await turns()
                await client.say(PROBE)
            assert (await client.answer())[0] == 415
            await client.say(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
            assert "version" in json.loads((await client.answer())[1])

    run(scenario())


@pytest.mark.parametrize(
    "wish",
    [
        b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAA\r\n",
        b"UPGRADE: TLS/1.0, h2c\r\ncOnnection: keep-alive, uPgRaDe\r\n",
        b"upgrade: a\r\nconnection: x\r\nupgrade: b\r\nconnection: upgrade ,y\r\n",
        b"upgrade: h2c\r\n",
        b"connection: upgrade\r\n",
        b"connection: upgrade\r\nupgrade:\r\n",
        b"",
    ],
)
@pytest.mark.parametrize("ws", ["none", "auto"])
def test_no_spelling_of_a_wish_for_another_protocol_is_heard(services: Any, wish: bytes, ws: str) -> None:
    async def scenario() -> None:
        async with connected(services, ws=ws) as client:
            for _ in range(2):
                await client.say(counted("four", wish))
                assert json.loads((await client.answer())[1])["count"] == 4
                await client.say(PROBE[:-2] + wish + b"\r\n")
                assert (await client.answer())[0] == 200

    run(scenario())


def test_what_a_request_wishes_besides_is_heard(services: Any) -> None:
    """That it be the last, and that it be told when to send its body; and what stands at its end is no wish."""
    last = UPGRADE.replace(b"Upgrade,", b"Upgrade, close,")

    async def scenario() -> None:
        async with connected(services, ws="none") as client:
            head, _, body = counted("four", more=b"expect: 100-continue\r\n").partition(b"\r\n\r\n")
            await client.say(head + b"\r\n\r\n")
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            await client.say(body)
            assert (await client.answer())[0] == 200
            await client.say(counted("four", b"", chunked=True)[:-2] + UPGRADE + b"\r\n")
            assert (await client.answer())[0] == 200
            await client.say(counted("four", last) + PROBE)
            assert (await client.answer())[0] == 200
            assert await client.reader.read() == b""

    run(scenario())


def test_wishes_for_another_protocol_are_not_answered_behind_a_request_either(services: Any) -> None:
    async def scenario() -> None:
        async with connected(services, ws="none") as client:
            await client.say(counted("four") * 9)
            assert json.loads((await client.answer())[1])["count"] == 4
            assert await client.reader.read() == b""

    run(scenario())


@pytest.mark.parametrize(
    ("version", "wish"), [(b"1.0", b""), (b"1.0", UPGRADE), (b"2.0", b"connection: keep-alive\r\n")]
)
def test_a_stream_to_a_client_that_knows_no_chunks_ends_with_the_connection(
    services: Any, version: bytes, wish: bytes
) -> None:
    async def heard(asked: bytes) -> tuple[bytes, bytes]:
        async with connected(services) as client:
            await client.say(asked)
            head, _, body = (await client.reader.read()).partition(b"\r\n\r\n")
            return head.lower(), body

    async def scenario() -> None:
        old = post(stream=True).replace(b"HTTP/1.1\r\n", b"HTTP/%b\r\n%b" % (version, wish))
        head, body = await heard(old)
        assert b"transfer-encoding" not in head
        assert b"content-length" not in head
        assert b"connection: close" in head
        assert body.startswith(b"data: {")
        assert body.endswith(b"data: [DONE]\n\n")
        head, body = await heard(PROBE.replace(b"HTTP/1.1\r\n", b"HTTP/1.0\r\n"))
        assert b"content-length: %d" % len(body) in head
        new = post(stream=True).replace(b"host", b"connection: close\r\nhost")
        head, body = await heard(new)
        assert b"transfer-encoding: chunked" in head
        assert body.endswith(b"0\r\n\r\n")

    run(scenario())


def test_a_client_that_knows_no_chunks_is_not_told_to_go_on(services: Any) -> None:
    async def scenario() -> None:
        async with connected(services) as client:
            old = post().replace(b"HTTP/1.1\r\n", b"HTTP/1.0\r\nexpect: 100-continue\r\n")
            await client.say(old)
            assert (await client.answer())[0] == 200

    run(scenario())


@pytest.mark.parametrize("breaks", [False, True])
def test_a_broken_answer_without_an_end_of_its_own_does_not_look_whole(breaks: bool) -> None:
    class Transport:
        aborted = False

        def abort(self) -> None:
            self.aborted = True

    class Cycle:
        transport = Transport()
        chunked_encoding = keep_alive = True
        expected_content_length = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        if not breaks:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def nothing(*_: Any) -> Any:
        return {}

    asyncio.run(protocol._unframed(app, cycle := Cycle(), {"type": "http"}, nothing, nothing))
    assert cycle.transport.aborted is breaks
    assert not cycle.chunked_encoding
    assert not cycle.keep_alive


@pytest.mark.parametrize("target", [b"a.example:443", b"/tokenize"])
def test_a_tunnel_is_refused_with_all_that_is_sent_into_it(services: Any, target: bytes) -> None:
    async def scenario() -> None:
        async with connected(services, ws="none") as client:
            await client.say(b"CONNECT " + target + b" HTTP/1.1\r\nhost: x\r\n\r\n" + PROBE)
            status, body = await client.answer()
            assert (status, json.loads(body)["error"]["type"]) == (400, "invalid_request_error")
            assert await client.reader.read() == b""

    run(scenario())


@pytest.mark.parametrize(
    ("said", "path", "status"),
    [
        (b"\x16\x03\x01 hello\r\n\r\n", "other", 400),
        (PROBE[:-2] + b"x: " + b"a" * 1_000_000, "other", 431),
        (post().partition(b"content-length")[0] + b"transfer-encoding: chunked\r\n\r\nzz\r\n", "/v1/completions", 400),
    ],
)
def test_what_is_refused_before_the_application_hears_of_it_is_counted_and_logged(
    services: Any, call: Any, caplog: pytest.LogCaptureFixture, said: bytes, path: str, status: int
) -> None:
    caplog.set_level(logging.DEBUG, "ernie_serve.api.protocol")

    async def scenario() -> None:
        async with connected(services) as client:
            client.writer.write(said)
            assert (await client.answer())[0] == status

    run(scenario())
    assert f"A connection ends with {status}: " in caplog.text
    (line,) = re.findall(r"^ernie_serve_http_requests_total.*$", call("GET", "/metrics").text, re.MULTILINE)
    assert line == f'ernie_serve_http_requests_total{{path="{path}",status="{status}"}} 1.0'
