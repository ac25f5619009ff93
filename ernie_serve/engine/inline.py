"""The engine in a thread of the same process, held like one in a process of its own.

Knows the client it extends and the engine it runs. Knows nothing about tensors, text or HTTP.
"""

import subprocess
from contextlib import suppress
from multiprocessing import Pipe
from threading import Thread

from ernie_serve.engine import wire
from ernie_serve.engine.client import ProcessClient
from ernie_serve.engine.core import EngineCore
from ernie_serve.messages import EngineInfo


class InlineClient(ProcessClient):
    """An engine in a thread of this process, behind the same pipe: for tests, the command line and debuggers."""

    def __init__(self, core: EngineCore, info: EngineInfo) -> None:
        ours, theirs = Pipe()
        super().__init__(ours, _EngineThread(core, theirs))
        self._progress = (1.0, "ready")
        self._info = info
        self._state = "ready"


class _EngineThread:
    """A thread that serves an engine and can be waited for like a process."""

    def __init__(self, core: EngineCore, connection: wire.Connection) -> None:
        self._core = core
        self._connection = connection
        self._exit_code = 1
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise subprocess.TimeoutExpired("engine thread", timeout or 0.0)
        return self._exit_code

    def terminate(self) -> None:
        """A thread ends when it has read `Shutdown`."""

    kill = terminate

    def _run(self) -> None:
        with suppress(Exception):  # reported through the pipe, and logged
            self._core.serve(self._connection)
            self._exit_code = 0
        self._connection.close()
