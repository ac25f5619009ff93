"""The API's hold on the engine: start a request, read its outputs, abort it.

Knows messages and one pipe. Knows nothing about tensors, text or HTTP, nor how the engine process is started.
"""

import asyncio
import logging
import signal
import subprocess
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from functools import partial
from itertools import islice, takewhile
from queue import SimpleQueue
from threading import Thread
from typing import Literal, Protocol

from ernie_serve.engine import wire
from ernie_serve.engine.outputs import OutputQueue
from ernie_serve.errors import EngineFailure, EngineUnavailable
from ernie_serve.messages import (
    Abort,
    EngineCommand,
    EngineInfo,
    EngineOutput,
    EngineReport,
    EngineRequest,
    EngineStats,
    Failed,
    Generate,
    Loading,
    Ready,
    Shutdown,
    Stepped,
    Working,
)

logger = logging.getLogger(__name__)

EngineState = Literal["loading", "ready", "failed", "closed"]


class EngineClient(Protocol):
    """What the API sees of an engine, whether it runs in another process or in this one."""

    @property
    def state(self) -> EngineState:
        """Whether requests are taken."""

    @property
    def progress(self) -> tuple[float, str]:
        """How far loading is: a share between 0 and 1, and what is being done."""

    @property
    def info(self) -> EngineInfo | None:
        """What the engine said of itself when it was ready."""

    @property
    def stats(self) -> EngineStats:
        """The counts after the last step."""

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Run a request; the last output has a `finish_reason`.

        Leaving the iterator early (closing it, or cancelling the task that reads it) aborts the request.
        Raises `EngineUnavailable` when the engine is not ready or ends before the request does, `EngineFailure` when
        the request has no form in which it could be told.
        """


class EngineProcess(Protocol):
    """What a client needs of the process at the other end of its pipe; `subprocess.Popen` is one."""

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, below 0 for a signal. Raises `subprocess.TimeoutExpired` after so many seconds."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""


class ProcessClient:
    """An engine at the other end of a pipe. Requests are started and read in one event loop at a time.

    Two threads stand between the loop and the pipe, so that neither a long prompt nor a long step stops the loop.
    What the engine says of itself can be read at any time, from any thread. The pipe's end is the engine's end, so
    only the engine process may hold the other side.
    """

    def __init__(
        self, connection: wire.Connection, process: EngineProcess, *, close_timeout_seconds: float = 10.0
    ) -> None:
        self._connection = connection
        self._process = process
        self._close_timeout_seconds = close_timeout_seconds
        self._state: EngineState = "loading"
        self._progress = (0.0, "starting")
        self._failure = ""
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._heard_at = 0.0  # when the last report came, by `time.monotonic`
        self._asked_at: float | None = None  # when the first command after that was given
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queues: dict[str, OutputQueue] = {}  # of unfinished requests; only the loop touches it
        self._undelivered: deque[EngineOutput] = deque()  # so is this
        self._delivering: asyncio.Handle | None = None  # and what hands out more of that
        self._commands: SimpleQueue[EngineCommand | None] = SimpleQueue()
        self._reader = Thread(target=self._read, name="engine-reader", daemon=True)
        self._writer = Thread(target=self._write, name="engine-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    @property
    def state(self) -> EngineState:
        """Whether requests are taken."""
        return self._state

    @property
    def progress(self) -> tuple[float, str]:
        """How far loading is: a share between 0 and 1, and what is being done."""
        return self._progress

    @property
    def failure(self) -> str:
        """Why the engine ended, if it did; empty otherwise."""
        return self._failure

    @property
    def info(self) -> EngineInfo | None:
        """What the engine said of itself when it was ready."""
        return self._info

    @property
    def stats(self) -> EngineStats:
        """The counts after the last step."""
        return self._stats

    @property
    def silent_seconds(self) -> float:
        """How long an engine that is ready has said nothing though it has something to do; otherwise 0."""
        since = self._asked_at
        if since is None and self._queues:
            since = self._heard_at
        return time.monotonic() - since if since is not None and self._state == "ready" else 0.0

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Run a request, as `EngineClient` promises. A slow reader gets the tokens of several steps at once."""
        self._loop = asyncio.get_running_loop()  # before the state is read: who ends the engine goes the other way
        if self._state != "ready":
            raise self._unavailable()
        request_id = request.request_id
        if request_id in self._queues:
            raise ValueError(f"A request with the id {request_id!r} is under way; ids must differ.")
        outputs = self._queues[request_id] = OutputQueue()
        self._ask(Generate(request))
        try:
            while True:
                output = await outputs.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            if self._queues.get(request_id) is outputs:
                del self._queues[request_id]
                self._ask(Abort(request_id))

    def _ask(self, command: EngineCommand) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        self._commands.put(command)

    def give_up(self, reason: str) -> None:
        """End an engine that does not answer, and its requests with it."""
        self._note_end(reason)
        self._process.kill()

    async def close(self) -> None:
        """End the engine: ask it, wait for a bounded time, then kill it. Its requests end with `EngineUnavailable`."""
        if self._state == "closed":
            return
        if self._state == "loading":
            self._process.terminate()  # it does not listen yet
        self._state = "closed"
        self._fail_requests()
        self._commands.put(Shutdown())
        self._commands.put(None)
        await asyncio.to_thread(self._wait_for_end)

    def _wait_for_end(self) -> None:
        try:
            self._process.wait(self._close_timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._close_timeout_seconds)
        self._reader.join(self._close_timeout_seconds)
        self._writer.join(self._close_timeout_seconds)
        if not self._reader.is_alive() and not self._writer.is_alive():
            self._connection.close()

    def _write(self) -> None:
        """The writer thread: commands into the pipe, until there is no more or nobody to hear them."""
        while (command := self._commands.get()) is not None:
            try:
                wire.send(self._connection, command)
            except OSError:
                return
            except Exception as error:  # it has no form in the pipe, of which nothing was written then
                logger.error("A command could not be told to the engine: %s", type(error).__name__)
                if isinstance(command, Generate):
                    self._in_loop(partial(self._refuse, command.request.request_id, type(error).__name__))

    def _refuse(self, request_id: str, why: str) -> None:
        """End a request that the engine has not heard of. Its reader aborts it then, to which the engine answers."""
        if queue := self._queues.get(request_id):
            queue.fail(EngineFailure(f"The request could not be told to the engine ({why})."))

    def _read(self) -> None:
        """The reader thread: reports out of the pipe, until its end."""
        try:
            while True:
                self._hear(wire.receive_report(self._connection))
        except (EOFError, OSError):
            self._note_end(self._exit_reason())
        except Exception as error:
            self._note_end(f"The engine's report could not be read: {type(error).__name__}: {error}")

    def _hear(self, report: EngineReport) -> None:
        self._heard_at, self._asked_at = time.monotonic(), None
        match report:
            case Loading(share, what):
                self._progress = (share, what)
            case Ready(info):
                self._info = info
                self._progress = (1.0, "ready")
                if self._state == "loading":
                    self._state = "ready"
            case Stepped(outputs, stats):
                self._stats = stats
                if outputs:
                    self._in_loop(lambda: self._deliver(outputs))
            case Working():
                pass  # that it was heard of is all
            case Failed(message):
                self._note_end(message)

    def _deliver(self, outputs: list[EngineOutput]) -> None:
        """Hand a step out: what ends, several in a turn of the loop, some turns later the rest, one in each turn.

        All in one turn would be milliseconds with many streams: nothing is sent before its end, and what an ended
        request still needs, such as its charge, would wait at each of its steps for the tokens of all others.
        """
        if self._delivering is not None:
            self._delivering.cancel()
        self._hand_out(len(self._undelivered))  # of the step before, so that no output overtakes another
        self._undelivered.extend(sorted(outputs, key=lambda output: output.finish_reason is None))
        self._deliver_on()

    def _deliver_on(self) -> None:
        first = islice(self._undelivered, _ENDED_TOGETHER)
        num_ended = sum(1 for _ in takewhile(lambda output: output.finish_reason is not None, first))
        self._hand_out(min(max(1, num_ended), len(self._undelivered)))
        if self._undelivered:
            self._deliver_in(_TURNS_OF_AN_END if num_ended else 1)

    def _deliver_in(self, turns: int) -> None:
        """Hand out more, so many turns of the loop later; those in which nothing happens take microseconds."""
        loop = asyncio.get_running_loop()
        if turns == 1:
            self._delivering = loop.call_soon(self._deliver_on)
        else:
            self._delivering = loop.call_soon(self._deliver_in, turns - 1)

    def _hand_out(self, count: int) -> None:
        for _ in range(count):
            output = self._undelivered.popleft()
            queue = self._queues.get(output.request_id)
            if queue is None:
                continue  # aborted while the step ran
            queue.put(output)
            if output.finish_reason is not None:
                del self._queues[output.request_id]

    def _note_end(self, reason: str) -> None:
        """The engine ends, or has ended. The first reason is the one that counts."""
        if self._state in ("failed", "closed"):
            return
        self._failure = reason
        self._state = "failed"
        self._in_loop(self._fail_requests)

    def _exit_reason(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "The engine process closed its pipe."
        if code < 0:
            return f"The engine process was ended by signal {-code}.{_SIGNALS.get(-code, '')}"
        return f"The engine process ended with exit code {code}."

    def _fail_requests(self) -> None:
        self._hand_out(len(self._undelivered))
        for queue in self._queues.values():
            queue.fail(self._unavailable())
        self._queues.clear()

    def _unavailable(self) -> EngineUnavailable:
        match self._state:
            case "failed":
                return EngineUnavailable(f"The engine has ended. {self._failure}")
            case "closed":
                return EngineUnavailable("The server is shutting down.")
        share, what = self._progress
        return EngineUnavailable(f"The engine is still loading ({share:.0%}, {what}).", retry_after_seconds=5)

    def _in_loop(self, callback: Callable[[], None]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # a closed loop has no readers
                self._loop.call_soon_threadsafe(callback)


_ENDED_TOGETHER = 8
"""So many that end get their last outputs in one turn of the event loop, so that they are charged together."""
_TURNS_OF_AN_END = 4
"""In the next it is charged, in that after it its last text is told, then its charge is heard of, then it is sent."""

_SIGNALS: dict[int, str] = {
    signal.SIGKILL: " The system does that when memory runs out: try --quantization int4, or a lower "
    "--kv-cache-memory-bytes.",
    signal.SIGBUS: " A file of the checkpoint was cut off or could not be read while it was served.",
}
