"""Says whether grammars compile, in processes that can be killed.

Knows the compiler, pipes and a time limit. Knows nothing of requests or HTTP. What compiles a hostile grammar may
take minutes or gigabytes, or crash, and native code in a thread cannot be stopped: a process can. Limits on size come
first and refuse most of it; who passes here is compiled by the engine without a second thought.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from socket import socketpair
from threading import Lock

import msgspec

from ernie_serve.errors import InvalidRequest, Overloaded
from ernie_serve.grammar.compiler import GrammarCompiler, Vocabulary
from ernie_serve.messages import Grammar


class GrammarChecker:
    """Checks grammars, several at a time. Safe for threads. Its processes start when they are first needed.

    Verdicts are remembered, so that a grammar that comes with every request costs one check.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        num_processes: int = 2,
        timeout_seconds: float = 1.0,
        max_verdicts: int = 1024,
    ) -> None:
        self._vocabulary = vocabulary.essentials()
        self._timeout_seconds = timeout_seconds
        self._max_verdicts = max_verdicts
        self._verdicts: dict[bytes, str] = {}  # by digest, the oldest first
        self._lock = Lock()
        self._idle: SimpleQueue[_Child | None] = SimpleQueue()  # `None` is a child that is not started
        self._num_processes = num_processes
        for _ in range(num_processes):
            self._idle.put(None)

    def check(self, grammar: Grammar) -> None:
        """Raise `InvalidRequest`, which says what is wrong, unless the grammar compiles in time.

        Blocks for at most a second or so of compiling, and while as many others as there are processes do the same.
        Raises `Overloaded` where the machine has no time for it.
        """
        digest = blake2b(msgspec.msgpack.encode(grammar), digest_size=32).digest()
        verdict = self._verdicts.get(digest)
        if verdict is None:
            verdict = self._ask(grammar)
            self._remember(digest, verdict)
        if verdict:
            raise InvalidRequest(verdict)

    def close(self) -> None:
        """End the processes. Nothing may be checked afterwards."""
        for _ in range(self._num_processes):
            if child := self._idle.get():
                child.end()

    def _ask(self, grammar: Grammar) -> str:
        with self._child() as child:
            verdict = child.ask(grammar, self._timeout_seconds)
        if verdict is None:
            return (
                f"The grammar takes more than {self._timeout_seconds:g} s or too much memory to compile. Simplify it: "
                "use fewer alternatives, shorter repetitions and patterns that overlap less."
            )
        return verdict

    @contextmanager
    def _child(self) -> Iterator["_Child"]:
        """A process that nobody else asks; one that has died is replaced when it is next needed."""
        child = self._idle.get()
        try:
            if child is None or not child.is_alive:
                child = _Child(self._vocabulary)
            yield child
        finally:
            self._idle.put(child if child is not None and child.is_alive else None)

    def _remember(self, digest: bytes, verdict: str) -> None:
        with self._lock:
            self._verdicts[digest] = verdict
            while len(self._verdicts) > self._max_verdicts:
                del self._verdicts[next(iter(self._verdicts))]


class _Child:
    """One process that checks, and the pipe to it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        ours, theirs = socketpair()
        command = [sys.executable, "-m", "ernie_serve.grammar.checker", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self._pipe = Connection(ours.detach())
        self._has_ended = False
        self._pipe.send_bytes(msgspec.msgpack.encode((list(vocabulary.tokens), sorted(vocabulary.control_ids))))
        if self._receive(_START_SECONDS) is None:
            raise RuntimeError(f"the process that checks grammars did not start within {_START_SECONDS:g} s")

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return not self._has_ended and self._process.poll() is None

    def ask(self, grammar: Grammar, timeout_seconds: float) -> str | None:
        """What is wrong with a grammar, empty if nothing is; `None` if it took too long, and the process is gone.

        What counts is the time that it computes. Raises `Overloaded` where it hardly gets to that.
        """
        began, until = self._computed_seconds(), time.monotonic() + _PATIENCE * max(timeout_seconds, 1.0)
        with suppress(OSError):
            self._pipe.send_bytes(msgspec.msgpack.encode(grammar))
            left = timeout_seconds
            while not self._pipe.poll(left):
                left = timeout_seconds - (self._computed_seconds() - began)
                if left <= 0:
                    break
                if time.monotonic() > until:
                    self.end()
                    raise Overloaded("The server is too busy to check this grammar. Try again.", retry_after_seconds=5)
                left = max(left, 0.05)
        return self._receive(0.0)

    def _receive(self, timeout_seconds: float) -> str | None:
        with suppress(EOFError, OSError):
            if self._pipe.poll(timeout_seconds):
                return self._pipe.recv_bytes().decode()
        self.end()
        return None

    def _computed_seconds(self) -> float:
        """How long the process has computed; raises no error where it has ended."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """Kill the process and wait for its end."""
        self._has_ended = True
        self._process.kill()
        self._process.wait()
        self._pipe.close()


_MAX_MEMORY = 2 << 30
_START_SECONDS = 20.0
_PATIENCE = 10
"""How many times as long as it may compute a process may take by the clock."""


def serve(pipe: Connection) -> None:
    """The other side: answer until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the end of the pipe is ours
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    tokens, control_ids = msgspec.msgpack.decode(pipe.recv_bytes(), type=tuple[list[bytes], list[int]])
    compiler = GrammarCompiler(Vocabulary(tokens, frozenset(control_ids)))
    pipe.send_bytes(b"ready")
    with suppress(EOFError, OSError):
        while True:
            grammar = msgspec.msgpack.decode(pipe.recv_bytes(), type=Grammar)
            try:
                compiler.check(grammar)
            except InvalidRequest as error:
                pipe.send_bytes(error.message.encode("utf-8", "replace"))
            else:
                pipe.send_bytes(b"")


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
