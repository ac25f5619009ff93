"""`ernie-serve serve` in a process of its own, for tests that need what users have: a port, signals, an end.

Knows how a small server is started and read. Knows nothing of what is asked of it.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODEL = "tiny"
DEADLINE_SECONDS = 120.0


class Server:
    """A server on a free port, which has said its address. Without a folder it serves the bundled model."""

    def __init__(self, folder: Path | None, *flags: str, **environ: str) -> None:
        small = ["--port", "0", "--kv-cache-memory-bytes", "16MiB", "--threads", "1", "--dtype", "float32"]
        model = [] if folder is None else [str(folder), "--served-model-name", MODEL]
        command = [sys.executable, "-m", "ernie_serve", "serve", *model, *small, *flags]
        more = os.environ | {"COLUMNS": "200"} | environ
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=more)
        self.lines: list[str] = []
        self.url = self._read_until(r"URL\s+(http://\S+)")

    def _read_until(self, pattern: str) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError(f"the server ended before it was ready:\n{''.join(self.lines)}")

    @property
    def root(self) -> str:
        """The address without the API's version."""
        return self.url.removesuffix("/v1")

    @property
    def engine_id(self) -> int:
        """The engine's process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def end(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; the exit code, and what was still said."""
        self.process.send_signal(how)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """The exit code, and what was said up to it."""
        _, rest = self.process.communicate(timeout=DEADLINE_SECONDS)
        return self.process.returncode, rest


@contextmanager
def running(folder: Path | None, *flags: str, **environ: str) -> Iterator[Server]:
    """A server until the end of the block, where it is killed if it still runs."""
    server = Server(folder, *flags, **environ)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        assert server.process.stderr is not None
        server.process.stderr.close()
