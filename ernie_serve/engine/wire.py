"""What runs over the pipe between the API and the engine process: msgpack bytes, one message at a time.

Knows the messages' two directions and what a connection can do. Knows nothing of who is at either end.
"""

from typing import Protocol

from msgspec import msgpack

from ernie_serve.messages import EngineCommand, EngineReport


class Connection(Protocol):
    """A duplex pipe that keeps messages whole; `multiprocessing.connection.Connection` is one."""

    def poll(self, timeout: float | None = 0.0, /) -> bool:
        """Whether a message, or the end, can be read within so many seconds; `None` waits for it."""

    def recv_bytes(self) -> bytes:
        """The next message. Raises `EOFError` once the other side is gone."""

    def send_bytes(self, buf: bytes, /) -> None:
        """Send a message; waits while the pipe is full. Raises `OSError` once the other side is gone."""

    def close(self) -> None:
        """Let go of this end."""


def send(connection: Connection, message: EngineCommand | EngineReport) -> None:
    """Send one message."""
    connection.send_bytes(msgpack.encode(message))


def receive_command(connection: Connection) -> EngineCommand:
    """What the API wants next. Raises `EOFError` once it is gone."""
    return _commands.decode(connection.recv_bytes())


def receive_report(connection: Connection) -> EngineReport:
    """What the engine says next. Raises `EOFError` once it is gone."""
    return _reports.decode(connection.recv_bytes())


_commands: msgpack.Decoder[EngineCommand] = msgpack.Decoder(EngineCommand)
_reports: msgpack.Decoder[EngineReport] = msgpack.Decoder(EngineReport)
