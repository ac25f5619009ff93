"""Fakes for the rooms below the API, and a way to call it."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import httpx
import msgspec
import pytest
import uvicorn
from fastapi import FastAPI

from ernie_serve.api.app import create_app
from ernie_serve.api.services import Limits, Services
from ernie_serve.engine.client import EngineState
from ernie_serve.errors import EngineUnavailable
from ernie_serve.messages import EngineInfo, EngineOutput, EngineRequest, EngineStats, ErrorCode, TokenLogprobs
from ernie_serve.text.formats import OutputFormat
from ernie_serve.text.generation import GenerationDefaults
from ernie_serve.text.template import ChatTemplate
from ernie_serve.text.tokenizer import Tokenizer

EOS = 256
HIDDEN = 257
TAGS = ["</s>", "<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"]
VOCAB_SIZE = EOS + len(TAGS)


class ByteTokenizer:
    """Every byte is a token; one more ends a text, and the tags of the family are special."""

    vocab_size = VOCAB_SIZE
    control_ids = frozenset(range(EOS, VOCAB_SIZE))
    _names: ClassVar = {EOS + number: tag.encode() for number, tag in enumerate(TAGS)}
    _tag = re.compile("(" + "|".join(TAGS) + ")")

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        pieces = self._tag.split(text) if parse_special else [text]
        return [i for piece in pieces for i in ([EOS + TAGS.index(piece)] if piece in TAGS else piece.encode())]

    def token_id(self, spelling: str) -> int | None:
        return EOS + TAGS.index(spelling) if spelling in TAGS else None

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(self.iter_bytes(ids, skip_special_tokens=skip_special_tokens)).decode("utf-8", "replace")

    def iter_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> Iterable[bytes]:
        return [self.token_bytes(i) for i in ids if not (skip_special_tokens and i in self.control_ids)]

    def token_bytes(self, token_id: int) -> bytes:
        return self._names.get(token_id) or bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")


class PlainTemplate:
    """`role: content`, a line each."""

    source = ""
    uses_tools = False
    thinks = False

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Any = None,
        add_generation_prompt: bool = True,
        variables: Any = None,
    ) -> list[int]:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return list(("".join(lines) + "assistant: " * add_generation_prompt).encode())


class ThinkingTemplate(PlainTemplate):
    """Lists tools, writes calls, and opens the answer's reasoning."""

    source = "<think> <response>"
    uses_tools = True
    thinks = True

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Any = None,
        add_generation_prompt: bool = True,
        variables: Any = None,
    ) -> list[int]:
        lines = [f"tools: {json.dumps(tools)}\n"] if tools else []
        for message in messages:
            lines.append(f"{message['role']}: {message['content']}\n")
            lines += [f"call: {json.dumps(call['function'])}\n" for call in message.get("tool_calls", [])]
        return [*"".join(lines).encode(), *([HIDDEN, 10] if add_generation_prompt else [])]


@dataclass
class ScriptedEngine:
    """Says the same reply to everybody, `step` tokens at a time, and insists on what a real engine needs.

    After `hang_after` tokens it waits for ever; after `break_after` it raises `breakage`, or ends with that reason.
    A step takes `turns` of the event loop.
    """

    reply: str | list[int] = "Hello, world!"
    replies: dict[bytes, str | list[int]] = field(default_factory=dict)
    step: int = 1
    turns: int = 1
    num_cached: int = 0
    hang_after: int | None = None
    break_after: int | None = None
    breakage: Exception | str = "error"
    error_code: ErrorCode = ""
    state: EngineState = "ready"
    state_when_broken: EngineState = "ready"
    progress: tuple[float, str] = (1.0, "ready")
    failure: str = ""
    info: EngineInfo | None = None
    stats: EngineStats = field(default_factory=EngineStats)
    requests: list[EngineRequest] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    left: list[str] = field(default_factory=list)
    num_made: int = 0
    begun: threading.Event = field(default_factory=threading.Event)
    idle: threading.Event = field(default_factory=threading.Event)
    someone_left: threading.Event = field(default_factory=threading.Event)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        if self.state != "ready":
            raise EngineUnavailable("not ready")
        self._insist(request)
        self.requests.append(request)
        self.running.add(request.request_id)
        finished = False
        try:
            made = 0
            for output in self._outputs(request):
                for _ in range(self.turns):
                    await asyncio.sleep(0)
                if self.hang_after is not None and made >= self.hang_after:
                    self.begun.set()
                    await asyncio.Event().wait()
                if self.break_after is not None and made >= self.break_after:
                    self.state = self.state_when_broken
                    if isinstance(self.breakage, Exception):
                        raise self.breakage
                    output = EngineOutput(
                        request_id=request.request_id,
                        finish_reason=cast("Any", self.breakage),
                        error="It broke.",
                        error_code=self.error_code,
                    )
                made += len(output.token_ids)
                self.num_made += len(output.token_ids)
                finished = output.finish_reason is not None
                yield output
                if finished:
                    return
        finally:
            self.running.discard(request.request_id)
            if not finished:
                self.left.append(request.request_id)
                self.someone_left.set()
            if not self.running:
                self.idle.set()

    def _insist(self, request: EngineRequest) -> None:
        sampling = request.sampling
        wire = msgspec.msgpack.encode(request)
        assert msgspec.msgpack.decode(wire, type=EngineRequest) == request, "a request is plain data"
        assert request.request_id not in {each.request_id for each in self.requests}, "ids are unique"
        assert request.prompt_token_ids, "a prompt has a token"
        assert all(0 <= token_id < VOCAB_SIZE for token_id in request.prompt_token_ids)
        assert sampling.max_tokens >= 1
        assert 0 <= sampling.min_tokens <= sampling.max_tokens
        assert 0 <= sampling.seed < 2**63
        assert sampling.temperature >= 0
        assert 0 < sampling.top_p <= 1
        assert sampling.top_k >= 0

    def _outputs(self, request: EngineRequest) -> Iterator[EngineOutput]:
        sampling = request.sampling
        reply = self.replies.get(bytes(i for i in request.prompt_token_ids if i < 256), self.reply)
        once = (list(reply.encode()) if isinstance(reply, str) else reply) + [EOS]
        tokens: list[int] = []
        for position in range(sampling.max_tokens):
            tokens.append(once[position % len(once)])
            if tokens[-1] in sampling.stop_token_ids and len(tokens) > sampling.min_tokens:
                break
        began_at = time.monotonic()
        stopped = tokens[-1] if tokens[-1] in sampling.stop_token_ids else None
        for start in range(0, len(tokens), self.step):
            ids = tokens[start : start + self.step]
            last = start + self.step >= len(tokens)
            yield EngineOutput(
                request_id=request.request_id,
                token_ids=ids,
                logprobs=[self._logprobs(i, sampling.logprobs) for i in ids] if sampling.logprobs is not None else [],
                finish_reason=("length" if stopped is None else "stop") if last else None,
                stop_token_id=stopped if last else None,
                num_cached_tokens=self.num_cached if start == 0 else 0,
                began_at=began_at if start == 0 else None,
                prompt_logprobs=self._scored(request) if start == 0 else [],
            )

    def _scored(self, request: EngineRequest) -> list[TokenLogprobs]:
        if (count := request.sampling.prompt_logprobs) is None:
            return []
        return [self._logprobs(i, count) for i in request.prompt_token_ids[1:]]

    def _logprobs(self, token_id: int, count: int) -> TokenLogprobs:
        top = [((token_id + offset) % VOCAB_SIZE, -0.5 - offset) for offset in range(count)]
        return TokenLogprobs(token_id, -0.5, top)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


def services_over(engine: Any, **changes: Any) -> Services:
    values: dict[str, Any] = {
        "engine": engine,
        "tokenizer": cast("Tokenizer", ByteTokenizer()),
        "template": cast("ChatTemplate", PlainTemplate()),
        "format": OutputFormat(cast("ChatTemplate", PlainTemplate()), cast("Tokenizer", ByteTokenizer())),
        "defaults": GenerationDefaults(stop_token_ids=(EOS,), chat_stop_token_ids=(EOS,)),
        "model_names": ("baidu/ernie", "ernie"),
        "max_model_len": 256,
        "created": 1_700_000_000,
        **changes,
    }
    return Services(**values)


@pytest.fixture
def make_services(engine: ScriptedEngine) -> Callable[..., Services]:
    return lambda **changes: services_over(**{"engine": engine, **changes})


@pytest.fixture
def services(make_services: Callable[..., Services]) -> Services:
    return make_services()


@pytest.fixture
def thinking_services(make_services: Callable[..., Services]) -> Services:
    """A checkpoint that thinks before it answers, and whose template lists tools."""
    template, tokenizer = cast("ChatTemplate", ThinkingTemplate()), cast("Tokenizer", ByteTokenizer())
    return make_services(template=template, format=OutputFormat(template, tokenizer), max_model_len=4096)


@pytest.fixture
def tagged() -> Callable[[str], list[int]]:
    """The ids of a text whose tags are control tokens."""
    return ByteTokenizer().encode


Call = Callable[..., httpx.Response]


def ask(app: FastAPI, method: str, path: str, **request: Any) -> httpx.Response:
    """One request to the application, without a socket."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


@pytest.fixture
def ask_app() -> Call:
    """One request to an application of the test's own."""
    return ask


@pytest.fixture
def call(services: Services) -> Call:
    app = create_app(services)
    return lambda method, path, **request: ask(app, method, path, **request)


@pytest.fixture
def call_with(make_services: Callable[..., Services]) -> Callable[..., Call]:
    """Call a server that differs from the usual one."""

    def make(**changes: Any) -> Call:
        app = create_app(make_services(**changes))
        return lambda method, path, **request: ask(app, method, path, **request)

    return make


@pytest.fixture
def complete(call: Call) -> Call:
    """POST /v1/completions with these fields changed."""
    return lambda **fields: call("POST", "/v1/completions", json={"model": "ernie", "prompt": "Hi", **fields})


@pytest.fixture
def chat(call: Call) -> Call:
    """POST /v1/chat/completions with these fields changed."""
    messages = [{"role": "user", "content": "Hi"}]
    return lambda **fields: call(
        "POST", "/v1/chat/completions", json={"model": "ernie", "messages": messages, **fields}
    )


@pytest.fixture
def call_thinking(thinking_services: Services) -> Call:
    """Call a server whose checkpoint thinks."""
    app = create_app(thinking_services)
    return lambda method, path, **request: ask(app, method, path, **request)


@pytest.fixture
def think(call_thinking: Call) -> Call:
    """POST /v1/chat/completions to a checkpoint that thinks."""
    messages = [{"role": "user", "content": "Hi"}]
    return lambda **fields: call_thinking(
        "POST", "/v1/chat/completions", json={"model": "ernie", "messages": messages, **fields}
    )


@pytest.fixture
def respond(call_thinking: Call) -> Call:
    """POST /v1/responses to a checkpoint that thinks."""
    return lambda **fields: call_thinking("POST", "/v1/responses", json={"model": "ernie", "input": "Hi", **fields})


@pytest.fixture
def read_events() -> Callable[[str], list[Any]]:
    """The data of a stream; the end is the string [DONE]."""

    def read(body: str) -> list[Any]:
        assert body.endswith("\n\n")
        lines = [block for block in body.removesuffix("\n\n").split("\n\n") if not block.startswith(":")]
        data = [line.removeprefix("data: ") for line in lines]
        assert all(line.startswith("data: ") for line in lines)
        return [each if each == "[DONE]" else json.loads(each) for each in data]

    return read


@pytest.fixture
def fast_limits() -> Limits:
    """Waits short enough to be seen in a test."""
    return Limits(ping_seconds=0.02, stall_seconds=0.2, body_seconds=0.05)


@pytest.fixture
def serve() -> Iterator[Callable[[FastAPI], str]]:
    """Serve an application on loopback; returns its address."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: FastAPI) -> str:
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


@dataclass
class Heard:
    """What a client heard before it left: the pieces of the body as they were sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> Any:
        return self.json()["error"]

    def chunks(self) -> list[Any]:
        """The data of a stream, without its last line."""
        lines = [line for line in self.body.decode().split("\n") if line.startswith("data: {")]
        return [json.loads(line.removeprefix("data: ")) for line in lines]


async def post(
    app: FastAPI,
    path: str,
    body: dict[str, Any],
    key: str | None = None,
    *,
    headers: dict[str, str] | None = None,
    leave_after: int | None = None,
    gone: asyncio.Event | None = None,
    on_send: Callable[[dict[str, Any]], None] = lambda message: None,
) -> Heard:
    """A POST in this event loop, by a client that leaves after so many pieces, or when `gone` is set.

    `on_send` sees all that is sent.
    """
    heard, content = Heard(), json.dumps(body).encode()
    gone = gone or asyncio.Event()
    sent = {
        "content-type": "application/json",
        **({"authorization": f"Bearer {key}"} if key else {}),
        **(headers or {}),
    }
    waiting = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if gone.is_set():
            return
        on_send(message)
        if message["type"] == "http.response.start":
            heard.status = message["status"]
            heard.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message["body"]:
            heard.pieces.append(message["body"])
        if leave_after is not None and len(heard.pieces) >= leave_after and message["type"] == "http.response.body":
            gone.set()

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        "server": ("test", 80),
        "scheme": "http",
    }
    await app(scope, receive, send)  # type: ignore[arg-type]
    return heard


@pytest.fixture(name="post")
def post_fixture() -> Callable[..., Any]:
    """`post`, which conftest cannot be asked for by name."""
    return post
