"""Builds the rooms, starts the engine process, and shuts everything down.

The only file that knows every room; `engine_process` builds the half of them that needs torch, and is imported here
only where the engine is to run in this process.
"""

import asyncio
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop
from fastapi import FastAPI

from ernie_serve import banner
from ernie_serve.api.measures import Measures
from ernie_serve.api.response_file import ResponseFile
from ernie_serve.api.response_store import KeptResponses, ResponseStore
from ernie_serve.billing.free import FreeMeter
from ernie_serve.billing.meter import Meter
from ernie_serve.billing.prices import prices_from_usd
from ernie_serve.bundled import ERNIE_TINY
from ernie_serve.config import Settings, flag_name, path_of
from ernie_serve.engine.client import EngineClient, ProcessClient
from ernie_serve.engine.inline import InlineClient
from ernie_serve.errors import CheckpointError, InvalidRequest, SettingsError, StartupError
from ernie_serve.grammar.checker import GrammarChecker
from ernie_serve.grammar.compiler import Vocabulary
from ernie_serve.http_server import Server, address_told, is_guarded, listen, url_of, web_config
from ernie_serve.logs import fill_standard_files, log_to_stderr
from ernie_serve.messages import EngineRequest, Grammar, SamplingParams
from ernie_serve.model import hub
from ernie_serve.model.config import ModelConfig
from ernie_serve.text.detokenize import Detokenizer
from ernie_serve.text.generation import GenerationDefaults
from ernie_serve.text.template import ChatTemplate
from ernie_serve.text.tokenizer import Tokenizer
from ernie_serve.worker import environment

logger = logging.getLogger(__name__)

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
    """A server and everything behind it. `names` are the model's, the first that of answers, `url` the API's base."""

    text: Text
    client: ProcessClient
    server: Server
    listener: socket.socket
    names: tuple[str, ...]
    url: str

    async def serve(self) -> None:
        """Answer requests until the server is told to stop."""
        await self.server.serve(sockets=[self.listener])


@asynccontextmanager
async def opened(settings: Settings, begins: Callable[[], None] = lambda: None) -> AsyncIterator[House]:
    """Take the port, build the rooms and start the engine process, which then loads; end it all on leaving.

    `begins` is called before there is anything that has to be ended: what comes until then may wait for a network.
    """
    listener = listen(settings)
    names = names_of(settings)
    text = open_text(settings)
    responses = open_responses(settings)
    meter = await open_meter(settings, names[0])
    begins()
    client = start_engine(_pinned(settings, text.folder), text.tokenizer.vocab_size)
    try:
        url = f"{url_of(listener)}/v1"
        checker = GrammarChecker(Vocabulary.of(text.tokenizer))
        measures = Measures()
        app = create_app(settings, text, client, names, checker.check, responses, meter, measures)
        server = Server(web_config(app, measures), settings.shutdown_timeout)
    except BaseException:  # a second Ctrl-C is one, wherever it comes
        await client.close()
        raise
    try:
        yield House(text, client, server, listener, names, url)
    finally:
        await client.close()
        await server.end_requests()
        await meter.close()
        responses.close()
        checker.close()
        listener.close()


def names_of(settings: Settings) -> tuple[str, ...]:
    """What requests may call the model: the names that were given, or else the checkpoint's."""
    return tuple(dict.fromkeys(settings.served_model_name)) or (settings.model or ERNIE_TINY.name,)


def serve(settings: Settings) -> None:
    """Serve until a signal says stop. Raises `StartupError` when the engine ends before that."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread: the engine has the other cores
    fill_standard_files()
    log_to_stderr(settings.log_level)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _MOST_FILES)), hard))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    told: list[int] = []
    try:
        async with opened(settings, begins=partial(_heed, told)) as house:
            with address_told(house.listener, settings.address_file):
                watcher = asyncio.create_task(_watch(house, settings))
                await house.serve()
                watcher.cancel()
            if house.client.failure:
                raise StartupError(house.client.failure)
    except asyncio.CancelledError:
        if not told:
            raise


def _heed(told: list[int]) -> None:
    """Let SIGTERM and SIGHUP end this task, as if its work were done, until the server listens to them itself."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def end(number: int) -> None:
        told.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            loop.add_signal_handler(number, end, number)


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
        takes_priority=takes_priority(settings),
        meter=meter,
        allowed_origins=settings.allowed_origins,
        own_name=None if is_guarded(settings) else settings.host,
        responses=responses,
        measures=measures,
    )
    return create(services)


def takes_priority(settings: Settings) -> bool:
    """Whether a request may say that it goes first: where requests are paid for, only if the operator says so."""
    return (settings.scheduling_policy or ("fcfs" if settings.billing else "priority")) == "priority"


def open_responses(settings: Settings) -> KeptResponses:
    """Where responses are kept: in the file of the settings, otherwise in memory. Raises `StartupError`."""
    file = settings.responses_file
    return ResponseFile(path_of("--responses-file", file)) if file else ResponseStore()


async def open_meter(settings: Settings, model: str) -> Meter:
    """Who may call, and what it costs: by the store, or else by the keys of the settings. Raises `StartupError`."""
    prices = prices_from_usd(settings.input_price, settings.output_price, settings.cached_input_price)
    if not settings.billing:
        return FreeMeter(settings.api_key)
    if settings.api_key:
        raise SettingsError(
            "--api-key and --billing exclude each other: with billing, keys are made by `ernie-serve keys create`."
        )
    from ernie_serve.billing import opening

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


class _InGroup(subprocess.Popen[bytes]):
    """A process with a group of its own, which a terminal's Ctrl-C does not reach."""

    def send_signal(self, sig: int) -> None:
        """While it lives, to all of its group: a compiler would go on for a minute."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.killpg(self.pid, sig)


def start_engine(settings: Settings, num_valid_ids: int) -> ProcessClient:
    """Start the engine process, which begins to load, and return the hold on it."""
    environment.prepare(os.environ)
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "ernie_serve.engine_process", str(theirs.fileno())]
    process = _InGroup(command, pass_fds=[theirs.fileno()], process_group=0)
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
        if vain := without_effect(settings, client.info.device):
            logger.warning("Without effect here: %s.", "; ".join(vain))
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


def without_effect(settings: Settings, device: str) -> list[str]:
    """What was set, by flag, environment or file, and does nothing, with the reason."""
    of_billing = ("database_url", "input_price", "cached_input_price", "output_price")
    vain = (
        ("on a CPU", device == "cpu", ("gpu_memory_utilization",)),
        ("without --billing", not settings.billing, of_billing),
    )
    told = []
    for why, idle, names in vain:
        if given := [flag_name(name) for name in names if idle and name in settings.model_fields_set]:
            told.append(f"{', '.join(given)} {why}")
    return told


def billing_told(settings: Settings) -> str | None:
    """What requests cost, where they cost something."""
    if not settings.billing:
        return None
    from ernie_serve.billing.database import store_told
    from ernie_serve.billing.opening import default_url

    store = store_told(settings.database_url or default_url())
    prices = prices_from_usd(settings.input_price, settings.output_price, settings.cached_input_price)
    other = prices.cached_nano != prices.input_nano
    cached = f" ({settings.cached_input_price} where the prefix cache had it)" if other else ""
    return f"on, {settings.input_price} USD in{cached} and {settings.output_price} USD out a million tokens; {store}"


def _pinned(settings: Settings, folder: Path) -> Settings:
    """Settings that name the commit found: a branch may move on before the engine process looks for itself."""
    is_local = folder in (ERNIE_TINY, Path(settings.model).expanduser())
    return settings if is_local else settings.model_copy(update={"revision": folder.name})


def open_inline(settings: Settings) -> tuple[Text, InlineClient]:
    """A checkpoint's text half and an engine in this process."""
    environment.prepare(os.environ)
    from ernie_serve.engine_process import build_engine

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
        shown = _Unframed().push if chat else str
        async for output in client.generate(
            EngineRequest(request_id="generate", prompt_token_ids=ids, sampling=sampling)
        ):
            if output.finish_reason == "error":
                raise StartupError(output.error)
            print(shown(detokenizer.push(output.token_ids)), end="", flush=True)
        print(shown(detokenizer.flush()))
    finally:
        await client.close()


class _Unframed:
    """Text in pieces, without the newlines before and behind all of it, as chats' answers have them."""

    def __init__(self) -> None:
        self._held = ""
        self._begun = False

    def push(self, piece: str) -> str:
        """What can be shown now: newlines wait for what comes behind them."""
        text = self._held + piece
        text = text if self._begun else text.lstrip("\n")
        told = text.rstrip("\n")
        self._held = text[len(told) :]
        self._begun |= bool(told)
        return told


def _prompt_ids(text: Text, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return text.tokenizer.encode(prompt)
    if text.template is None:
        raise StartupError("This checkpoint has no chat template: leave out --chat.")
    try:
        return text.template.render([{"role": "user", "content": prompt}])
    except InvalidRequest as error:
        raise StartupError(error.message) from error
