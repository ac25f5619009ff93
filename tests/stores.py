"""Stores for the tests: a SQLite file, and a PostgreSQL server that is started when one is installed.

A test that asks for `url` runs on both; without a server its PostgreSQL half is skipped, by name.
"""

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from ernie_serve.billing.accounts import AccountRecord, find_account
from ernie_serve.billing.clock import Clock
from ernie_serve.billing.database import Database
from ernie_serve.billing.keys import Caller
from ernie_serve.billing.office import NewKey, open_key
from ernie_serve.billing.opening import open_meter
from ernie_serve.billing.paid import PaidMeter
from ernie_serve.billing.prices import Prices
from ernie_serve.billing.reports import problems
from ernie_serve.billing.schema import metadata

ROOT = Path(__file__).parents[1]


@dataclass
class MovableClock:
    """A clock that stands until it is moved."""

    seconds: float = 1_800_000_000.0
    ns: int = 1_000_000_000_000
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(lambda: self.seconds, lambda: self.ns)

    def move(self, seconds: float) -> None:
        self.seconds += seconds
        self.ns += int(seconds * 1_000_000_000)


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a private PostgreSQL server, with the tables in it."""
    with private_postgres() as server:
        Database(server.url, make=True).close()
        yield server.url


class PrivatePostgres:
    """A PostgreSQL server in a folder of its own, which can be stopped and started again."""

    def __init__(self, folder: str) -> None:
        self.url = f"postgresql://postgres@/postgres?host={folder}"
        self._folder = folder
        self._log = Path(folder).with_suffix(".out")
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                [ROOT / "scripts" / "private-postgres", self._folder], stdout=out, stderr=out
            )
        _wait_for(self.url, self._process, self._log)

    def stop(self) -> None:
        """Stop it at once, whoever is connected."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)

    def forget(self) -> None:
        """Stop it for good."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._log.unlink()


@contextmanager
def private_postgres() -> Iterator[PrivatePostgres]:
    """A server that nobody else uses; the test is skipped where none is installed."""
    if not shutil.which("initdb") and not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    server = PrivatePostgres(tempfile.mkdtemp(prefix="ernie-pg-"))
    try:
        yield server
    finally:
        server.forget()


def _wait_for(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                with engine.connect():
                    return
            except Exception:
                time.sleep(0.1)
        raise AssertionError(log.read_text())
    finally:
        engine.dispose()


@pytest.fixture(scope="session")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the tables in it, to be copied."""
    path = tmp_path_factory.mktemp("store") / "empty.db"
    Database(f"sqlite:///{path}", make=True).close()
    return path


@pytest.fixture
def new_file(empty_file: Path, tmp_path: Path) -> Callable[[], str]:
    """A function that makes the URL of another empty SQLite store."""
    count = iter(range(1_000_000))

    def make() -> str:
        path = tmp_path / f"{next(count)}.db"
        shutil.copy(empty_file, path)
        return f"sqlite:///{path}"

    return make


@pytest.fixture
def sqlite_url(new_file: Callable[[], str]) -> str:
    """An empty SQLite store."""
    return new_file()


@pytest.fixture
def empty() -> Callable[[str], str]:
    """A function that empties a PostgreSQL store and gives its URL back."""
    return empty_postgres


@pytest.fixture
def postgres_url(postgres: str) -> str:
    """An empty PostgreSQL store."""
    return empty_postgres(postgres)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """An empty store, of either kind in turn."""
    name: str = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    return name


def empty_postgres(url: str) -> str:
    """Forget every row."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        names = ", ".join(metadata.tables)
        connection.execute(text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))
    engine.dispose()
    return url


PRICES = Prices()
MODEL = "ernie"


@dataclass
class Shop:
    """A store, a clock, and what tests do with them again and again."""

    url: str
    clock: MovableClock

    @asynccontextmanager
    async def open(self, prices: Prices = PRICES, clock: Clock | None = None) -> AsyncIterator[PaidMeter]:
        """A meter over the store. What it leaves must add up."""
        meter = await open_meter(self.url, MODEL, prices, clock or self.clock.clock)
        try:
            yield meter
            assert await meter.report(problems) == []
        finally:
            await meter.close()

    async def new_key(self, meter: PaidMeter, credit_nano: int = 10**9, **given: Any) -> NewKey:
        """A key of an account with that much credit."""
        given.setdefault("name", "test")
        return await meter.change(open_key, now=int(self.clock.seconds), credit_nano=credit_nano, **given)

    async def caller(self, meter: PaidMeter, credit_nano: int = 10**9, **given: Any) -> Caller:
        """Somebody with such a key."""
        return await meter.authenticate((await self.new_key(meter, credit_nano, **given)).key)

    async def account(self, meter: PaidMeter, caller: Caller) -> AccountRecord:
        """How the caller's account stands."""
        record = await meter.report(find_account, caller.account_id)
        assert record is not None
        return record


@pytest.fixture
def shop(url: str, clock: MovableClock) -> Shop:
    """A shop over each kind of store in turn."""
    return Shop(url, clock)


@pytest.fixture
def small_shop(sqlite_url: str, clock: MovableClock) -> Shop:
    """A shop over a SQLite file."""
    return Shop(sqlite_url, clock)
