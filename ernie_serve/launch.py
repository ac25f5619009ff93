"""Builds the rooms, starts the engine process, and shuts everything down.

The only file that knows every room; `engine_process` builds the half of them that needs torch, and is imported here
only where the engine is to run in this process.
"""

import asyncio
import errno
import ipaddress
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import uvicorn
import uvloop
from fastapi import FastAPI

from ernie_serve import banner
from ernie_serve.api.measures import Measures
from ernie_serve.api.protocol import HttpProtocol
from ernie_serve.api.response_file import ResponseFile
from ernie_serve.api.response_store import KeptResponses, ResponseStore
from ernie_serve.billing.free import FreeMeter
from ernie_serve.billing.meter import Meter
from ernie_serve.bundled import ERNIE_TINY
from ernie_serve.config import Settings
from ernie_serve.engine.client import EngineClient, ProcessClient
from ernie_serve.engine.inline import InlineClient
from ernie_serve.errors import CheckpointError, InvalidRequest, SettingsError, StartupError
from ernie_serve.grammar.checker import GrammarChecker
from ernie_serve.grammar.compiler import Vocabulary
from ernie_serve.logs import log_to_stderr
from ernie_serve.messages import EngineRequest, Grammar, SamplingParams
from ernie_serve.model import hub
from ernie_serve.model.config import ModelConfig
from ernie_serve.text.detokenize import Detokenizer
from ernie_serve.text.generation import GenerationDefaults
from ernie_serve.text.template import ChatTemplate
from ernie_serve.text.tokenizer import Tokenizer

_MOST_FILES = 65_536
"""So many connections and files are taken where the system lets us; each connection is one."""
_NICE = 5
"""How far this process steps back for an engine on the same cores, all of whose threads wait for the slowest."""


@dataclass(frozen=True, slots=True)
class Text:
    """What the API process reads of a checkpoint: everything but the weights."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: GenerationDefaults


@dataclass(frozen=True, slots=True)
class House:
    """A server and everything behind it. `name` is the model's name in answers, `url` the API's base."""

    text: Text
    client: ProcessClient
    server: "_Server"
    listener: socket.socket
    names: tuple[str, ...]
    url: str

    async def serve(self) -> None:
        """Answer requests until the server is told to stop."""
        await self.server.serve(sockets=[self.listener])


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[House]:
    """Take the port, build the rooms and start the engine process, which then loads; end it all on leaving."""
    listener = _listen(settings)
    names = tuple(dict.fromkeys((*settings.served_model_name, settings.model or ERNIE_TINY.name)))
    settings = with_checkpoint(settings)
    text = open_text(settings)
    responses = open_responses(settings)
    meter = await open_meter(settings, names[0])
    client = start_engine(_pinned(settings, text.folder), text.tokenizer.vocab_size)
    url = f"{_url(listener)}/v1"
    checker = GrammarChecker(Vocabulary.of(text.tokenizer))
    measures = Measures()
    app = create_app(settings, text, client, names, checker.check, responses, meter, measures)
    server = _Server(_web(app, measures), settings.shutdown_timeout)
    try:
        yield House(text, client, server, listener, names, url)
    finally:
        await client.close()
        await server.end_requests()
        await meter.close()
        responses.close()
        checker.close()
        listener.close()


def serve(settings: Settings) -> None:
    """Serve until a signal says stop. Raises `StartupError` when the engine ends before that."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread: the engine has the other cores
    log_to_stderr(settings.log_level)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _MOST_FILES)), hard))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    async with opened(settings) as house:
        with _address_told(house.listener, settings.address_file):
            watcher = asyncio.create_task(_watch(house, settings))
            await house.serve()
            watcher.cancel()
        if house.client.failure:
            raise StartupError(house.client.failure)


def create_app(
    settings: Settings,
    text: Text,
    client: EngineClient,
    names: tuple[str, ...],
    check_grammar: Callable[[Grammar], None],
    responses: KeptResponses,
    meter: Meter,
    measures: Measures,
) -> FastAPI:
    """The HTTP application over an engine."""
    from ernie_serve.api.app import create_app as create
    from ernie_serve.api.services import Services
    from ernie_serve.text.formats import OutputFormat

    services = Services(
        engine=client,
        tokenizer=text.tokenizer,
        template=text.template,
        defaults=text.defaults,
        format=OutputFormat(text.template, text.tokenizer) if text.template else None,
        check_grammar=check_grammar,
        model_names=names,
        max_model_len=settings.max_model_len or text.config.max_position_embeddings,
        max_output_tokens=settings.max_output_tokens,
        meter=meter,
        allowed_origins=settings.allowed_origins,
        responses=responses,
        measures=measures,
    )
    return create(services)


def open_responses(settings: Settings) -> KeptResponses:
    """Where responses are kept: in the file of the settings, otherwise in memory. Raises `StartupError`."""
    return ResponseFile(Path(settings.responses_file).expanduser()) if settings.responses_file else ResponseStore()


async def open_meter(settings: Settings, model: str) -> Meter:
    """Who may call, and what it costs: by the store, or else by the keys of the settings. Raises `StartupError`."""
    if not settings.billing:
        return FreeMeter(settings.api_key)
    if settings.api_key:
        raise SettingsError(
            "--api-key and --billing exclude each other: with billing, keys are made by `ernie-serve keys create`."
        )
    from ernie_serve.billing import opening
    from ernie_serve.billing.prices import prices_from_usd

    prices = prices_from_usd(settings.input_price, settings.output_price, settings.cached_input_price)
    return await opening.open_meter(settings.database_url or opening.default_url(), model, prices)


def open_text(settings: Settings) -> Text:
    """Read a checkpoint's config, tokenizer and template, fetching these from the hub if need be."""
    folder = hub.resolve(settings.model, settings.revision, "text")
    try:
        tokenizer = Tokenizer.from_folder(folder)
        config = ModelConfig.from_folder(folder)
        template = ChatTemplate.from_folder(folder, tokenizer)
        return Text(folder, config, tokenizer, template, GenerationDefaults.from_folder(folder, tokenizer, template))
    except OSError as error:
        what, why = error.filename or folder, error.strerror or error
        raise CheckpointError(f"{what} cannot be read: {why}. Look at its owner and its mode.") from None


def start_engine(settings: Settings, num_valid_ids: int) -> ProcessClient:
    """Start the engine process, which begins to load, and return the hold on it."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "ernie_serve.engine_process", str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    connection = Connection(ours.detach())
    told = settings.model_copy(update={"api_key": (), "database_url": None})  # secrets that are not the engine's
    connection.send_bytes(told.model_dump_json().encode())
    connection.send_bytes(str(num_valid_ids).encode())
    return ProcessClient(connection, process)


async def _watch(house: House, settings: Settings) -> None:
    """Follow the engine: show how it loads and what it serves; when it ends, or is stuck, end the server."""
    client = house.client
    with suppress(OSError, SystemExit):  # a terminal that is gone, or `tee`, at which rich exits
        await banner.show_loading(lambda: client.progress, lambda: client.state == "loading")
    while client.state == "loading":  # noqa: ASYNC110  # the state is set from the reader's thread
        await asyncio.sleep(0.2)
    if client.info is not None:
        if client.info.device == "cpu":
            os.nice(_NICE)
        with suppress(OSError, SystemExit):
            banner.show_ready(
                client.info,
                url=house.url,
                names=house.names,
                max_output_tokens=settings.max_output_tokens,
                num_keys=len(settings.api_key),
                billing=billing_told(settings),
            )
    num_silent = 0  # looks in a row: time in which this process was stopped too, as by Ctrl-Z, is not the engine's
    while client.state != "failed":  # the state is set from the reader's thread
        await asyncio.sleep(_LOOK_SECONDS)
        num_silent = num_silent + 1 if client.silent_seconds > num_silent * _LOOK_SECONDS else 0
        if num_silent * _LOOK_SECONDS > _STUCK_SECONDS:
            client.give_up(f"The engine had work and said nothing for {_STUCK_SECONDS:g} seconds; it was ended.")
    house.server.stop(grace_seconds=1)


_LOOK_SECONDS = 0.2
_STUCK_SECONDS = 300.0
"""How long an engine at work may say nothing: many times what a layer of a step takes."""


def billing_told(settings: Settings) -> str | None:
    """What requests cost, where they cost something."""
    if not settings.billing:
        return None
    store = "PostgreSQL" if (settings.database_url or "").startswith("postgresql") else "SQLite"
    return f"on, {settings.input_price} USD in and {settings.output_price} USD out a million tokens; {store}"


class _Server(uvicorn.Server):
    """Uvicorn, ended by the first signal when the running requests have ended, by the second at once.

    What still runs when its time is over is told by the rooms behind that the server ends, as at a second signal.
    """

    def __init__(self, config: uvicorn.Config, grace_seconds: int) -> None:
        super().__init__(config)
        self._grace_seconds = grace_seconds

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Take signals while serving; nothing is raised again afterwards, so that draining exits with 0."""
        loop = asyncio.get_running_loop()
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, self._hear)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup wants it
            loop.add_signal_handler(signal.SIGHUP, self._hear)
        yield

    def stop(self, grace_seconds: int | None = None) -> None:
        """Take no more requests, give the running ones their time, then end. A second time: end."""
        if self.should_exit:
            self._end()
            return
        self.should_exit = True
        grace = self._grace_seconds if grace_seconds is None else grace_seconds
        asyncio.get_running_loop().call_later(grace, self._end)

    def _hear(self) -> None:
        waited_for = 0 if self.should_exit else len(self.server_state.tasks)
        self.stop()
        if waited_for:
            with suppress(OSError, SystemExit):  # a terminal that is gone, or `tee`, at which rich exits
                banner.show_draining(waited_for, self._grace_seconds)

    def _end(self) -> None:
        self.force_exit = True

    async def end_requests(self) -> None:
        """End what the rooms behind have no word with: clients that take nothing, or never send their request."""
        if await self._tasks_end(1):
            return
        for connection in list(self.server_state.connections):
            assert isinstance(connection, HttpProtocol), "this server makes no others"
            connection.end()
        if await self._tasks_end(1):
            return
        for task in self.server_state.tasks:
            task.cancel()
        await self._tasks_end(5)

    async def _tasks_end(self, patience: float) -> bool:
        """Whether what is being answered has ended within so many seconds."""
        tasks = set(self.server_state.tasks)
        return not tasks or not (await asyncio.wait(tasks, timeout=patience))[1]


def _web(app: FastAPI, measures: Measures) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        ws="none",
        http=partial(HttpProtocol, answered=measures.answered),  # type: ignore[arg-type]  # a class by its stub, and called
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=75,
    )


def _listen(settings: Settings) -> socket.socket:
    """Take the port before anything slow begins."""
    require_guarded(settings)
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[0]
        remedy = "Choose another --port, or end what holds this one."
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            remedy = "Give --host an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them."
        raise SettingsError(f"{settings.host}:{settings.port} cannot be listened on ({why}). {remedy}") from None
    # connections inherit it; without it a small chunk waits up to 40 ms for the client to confirm the one before
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setblocking(False)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def _address_told(listener: socket.socket, file: str | None) -> Generator[None, None, None]:
    """Within this a file has the URL by which this machine reaches what is listened on. Raises `SettingsError`."""
    if file is None:
        yield
        return
    told = _url(listener).replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:") + "\n"
    try:
        path = Path(file).expanduser()
        path.write_text(told, encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise SettingsError(f"--address-file {file!r} cannot be written: {why}. Name another.") from None
    try:
        yield
    finally:
        with suppress(OSError):  # it may be another server's by now
            if path.is_file() and path.read_bytes() == told.encode():
                path.unlink()


def require_guarded(settings: Settings) -> None:
    """Raise `SettingsError` where other machines could use the server without a key, and nobody said that they may."""
    if settings.billing or settings.api_key or settings.allow_unauthenticated:
        return
    with suppress(socket.gaierror):  # the name of no address is for `_listen` to tell
        found = socket.getaddrinfo(settings.host or "0.0.0.0", None)  # noqa: S104  # what no host at all means
        if not all(ipaddress.ip_address(each[4][0]).is_loopback for each in found):
            raise SettingsError(
                f"{settings.host or 'Every address'} can be reached by other machines, and no key is asked for. Start "
                "with --billing or --api-key, or with --allow-unauthenticated if whoever reaches it may use it."
            )


def with_checkpoint(settings: Settings) -> Settings:
    """Settings whose model can be resolved: the bundled checkpoint by its folder."""
    if settings.model and settings.model != ERNIE_TINY.name:
        return settings
    return settings.model_copy(update={"model": str(ERNIE_TINY)})


def _pinned(settings: Settings, folder: Path) -> Settings:
    """Settings that name the commit found: a branch may move on before the engine process looks for itself."""
    return (
        settings
        if Path(settings.model).expanduser().is_dir()
        else settings.model_copy(update={"revision": folder.name})
    )


def open_inline(settings: Settings) -> tuple[Text, InlineClient]:
    """A checkpoint's text half and an engine in this process."""
    from ernie_serve.engine_process import build_engine

    settings = with_checkpoint(settings)
    text = open_text(settings)
    core, info = build_engine(settings, text.tokenizer.vocab_size, lambda share, what: None)
    return text, InlineClient(core, info)


def generate(settings: Settings, prompt: str, *, chat: bool, max_tokens: int, temperature: float) -> None:
    """Continue one prompt and print the text as it comes."""
    log_to_stderr(settings.log_level)
    with suppress(BrokenPipeError):
        asyncio.run(_generate(settings, prompt, chat, max_tokens, temperature))


async def _generate(settings: Settings, prompt: str, chat: bool, max_tokens: int, temperature: float) -> None:
    text, client = open_inline(settings)
    try:
        ids = _prompt_ids(text, prompt, chat)
        stop = text.defaults.stop_ids(chat=chat)
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=temperature, stop_token_ids=stop)
        detokenizer = Detokenizer(text.tokenizer, ids)
        async for output in client.generate(
            EngineRequest(request_id="generate", prompt_token_ids=ids, sampling=sampling)
        ):
            if output.finish_reason == "error":
                raise StartupError(output.error)
            print(detokenizer.push(output.token_ids), end="", flush=True)
        print(detokenizer.flush())
    finally:
        await client.close()


def _prompt_ids(text: Text, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return text.tokenizer.encode(prompt)
    if text.template is None:
        raise StartupError("This checkpoint has no chat template: leave out --chat.")
    try:
        return text.template.render([{"role": "user", "content": prompt}])
    except InvalidRequest as error:
        raise StartupError(error.message) from error
