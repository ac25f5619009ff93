"""The HTTP server: where it listens, who is told of that, and how it ends.

Knows sockets, signals and uvicorn. Knows nothing of what it serves.
"""

import asyncio
import errno
import ipaddress
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import partial

import uvicorn
from fastapi import FastAPI

from ernie_serve import banner
from ernie_serve.api.measures import Measures
from ernie_serve.api.protocol import HttpProtocol
from ernie_serve.config import Settings, path_of
from ernie_serve.errors import SettingsError


class Server(uvicorn.Server):
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


def web_config(app: FastAPI, measures: Measures) -> uvicorn.Config:
    """How uvicorn serves an application, whose answers `measures` counts with those of the connections."""
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


def listen(settings: Settings) -> socket.socket:
    """Take the port before anything slow begins."""
    require_guarded(settings)
    try:
        settings.host.encode()  # what is no text at all would leave a socket open
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        why = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        remedy, number = "Choose another --port, or end what holds this one.", getattr(error, "errno", None) or -1
        if number < 0 or number == errno.EADDRNOTAVAIL:  # below 0 are those of looking a name up
            remedy = "Give --host an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them."
        raise SettingsError(f"{settings.host}:{settings.port} cannot be listened on ({why}). {remedy}") from None
    # connections inherit it; without it a small chunk waits up to 40 ms for the client to confirm the one before
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL of what is listened on."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def address_told(listener: socket.socket, file: str | None) -> Generator[None, None, None]:
    """Within this a file has the URL by which this machine reaches what is listened on. Raises `SettingsError`."""
    if file is None:
        yield
        return
    told = url_of(listener).replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:") + "\n"
    try:
        path = path_of("--address-file", file)
        path.write_text(told, encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise SettingsError(f"--address-file {file!r} cannot be written: {why}. Name another.") from None
    try:
        yield
    finally:
        with suppress(OSError):  # it may be another server's by now
            if path.is_file() and path.read_bytes() == told.encode():
                path.unlink()


def is_guarded(settings: Settings) -> bool:
    """Whether keys are asked for, or somebody said that none are needed. Otherwise only this machine is served."""
    return bool(settings.billing or settings.api_key or settings.allow_unauthenticated)


def require_guarded(settings: Settings) -> None:
    """Raise `SettingsError` where other machines could use the server without a key, and nobody said that they may."""
    if is_guarded(settings):
        return
    with suppress(socket.gaierror, UnicodeError):  # the name of no address is for `listen` to tell
        found = socket.getaddrinfo(settings.host or "0.0.0.0", None)  # noqa: S104  # what no host at all means
        if not all(ipaddress.ip_address(each[4][0]).is_loopback for each in found):
            raise SettingsError(
                f"{settings.host or 'Every address'} can be reached by other machines, and no key is asked for. Start "
                "with --billing or --api-key, or with --allow-unauthenticated if whoever reaches it may use it."
            )
