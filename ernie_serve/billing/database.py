"""Opens a database: SQLite with the care that money needs, or PostgreSQL.

Knows URLs, pragmas and connections. Knows no table.

A hold need not outlive a power cut, because every hold is released when its process is gone; a settled request must. So
a transaction says whether it is `durable`, and only those wait for the disk: SQLite's `synchronous` is `FULL` for them
and `NORMAL` for the others, PostgreSQL's `synchronous_commit` is on or off.
"""

import fcntl
import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, QueuePool, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError

from ernie_serve.billing import boots
from ernie_serve.billing.migrations import migrate
from ernie_serve.config import path_of
from ernie_serve.errors import SettingsError, StartupError

STATEMENT_SECONDS = 2
COMPUTE_SECONDS = 0.002
"""How long SQLite may take over the statements of a group before it is called slow."""
COMMIT_SECONDS = 0.004
"""How long its commit, which is the flush of a disk, may take before it is called slow."""
_CONNECTIONS = 8
_READERS = 4


class Database:
    """Engines over one database, migrated. Raises `StartupError` where it cannot be opened or written.

    Only with `make` is a store made where there is none. What belongs to another program is left as it is.
    """

    def __init__(self, url: str, *, make: bool = False, synchronous: bool = True) -> None:
        self._url = _taken_apart(url)
        self.embedded = self._url.get_backend_name() == "sqlite"
        self._levels = ("FULL", "NORMAL") if synchronous else ("OFF", "OFF")
        self._level = ""
        self._kept: Connection | None = None
        self._alone = threading.Lock()
        self._lock: int | None = None
        if self.embedded:
            self._open_sqlite(make)
        elif self._url.get_backend_name() == "postgresql":
            self._open_postgresql()
        else:
            raise SettingsError(f"`{without_password(url)}` is neither SQLite nor PostgreSQL. {_EXAMPLES}")
        try:
            with self.transaction(durable=True, lane="") as connection:
                if not make and _OURS.difference(inspect(connection).get_table_names()):
                    raise _no_store(without_password(url))
                migrate(connection, self._is_served)
        except (DBAPIError, sqlite3.Error, UnicodeError) as error:  # the last of a host's name
            self.close()
            told = f"The billing database {without_password(url)} cannot be used: {cause_of(error)}"
            raise StartupError(told) from None
        except BaseException:
            self.close()
            raise
        self._let_others_serve()

    writer: Engine
    reader: Engine

    @property
    def num_writers(self) -> int:
        """How many transactions may be written at once."""
        return 1 if self.embedded else _CONNECTIONS

    @property
    def num_readers(self) -> int:
        """How many reports may be read at once."""
        return _READERS

    @property
    def path(self) -> str | None:
        """SQLite's file."""
        return self._url.database if self.embedded else None

    @contextmanager
    def transaction(self, *, durable: bool, lane: str) -> Iterator[Connection]:
        """One transaction, durable or quick. In PostgreSQL it takes the account `lane` before anything else."""
        if self.embedded:
            with self._alone, self._embedded_transaction(self._levels[0] if durable else self._levels[1]) as connection:
                yield connection
            return
        with self.writer.begin() as connection:
            if lane or not durable:
                statement = (_TAKE if durable else _TAKE_QUICKLY) if lane else _QUICKLY
                connection.execute(statement, {"id": lane} if lane else {})
            yield connection

    @contextmanager
    def moment(self) -> Iterator[Connection]:
        """A transaction that only reads, and sees what was there when it began, for as long as that takes."""
        level = {} if self.embedded else {"isolation_level": "REPEATABLE READ"}
        with self.reader.connect().execution_options(**level) as connection, connection.begin():
            if not self.embedded:
                connection.execute(_UNHURRIED)
            yield connection

    @contextmanager
    def _embedded_transaction(self, level: str) -> Iterator[Connection]:
        """One transaction on the connection that is kept for them, begun and ended by the driver itself.

        SQLAlchemy's own begin, commit and return to the pool take longer than most of what is done in between.
        """
        if self._kept is None:
            self._kept = self.writer.connect()
        connection = self._kept
        raw: Any = connection.connection.driver_connection
        if level != self._level:
            raw.execute(f"PRAGMA synchronous={level}")
            self._level = level
        raw.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            raw.execute("COMMIT")
        finally:
            raw.rollback()  # nothing, once committed
            if connection.in_transaction():
                connection.rollback()

    def hold_alone(self) -> None:
        """Say that this process serves from this SQLite file. Raises `StartupError` where another one does."""
        if not self._take_lock():
            raise StartupError(
                f"Another server charges to {self._url.database}. Give each its own --database-url, or one PostgreSQL "
                "to all of them."
            )

    def _take_lock(self) -> bool:
        """Take the file that stands for serving; `False` where another process has it."""
        path = f"{os.path.realpath(self._url.database or '')}.lock"
        try:
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _not_writable(path, error.strerror or str(error)) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Let go of every connection."""
        if self._kept is not None:
            self._kept.close()
        self.writer.dispose()
        self.reader.dispose()
        self._let_others_serve()

    def _is_served(self, connection: Connection) -> bool:
        """Whether a server lives that charges here. None begins to while a SQLite file is opened after that."""
        if not self.embedded:
            return boots.anybody_lives(connection)
        return not self._take_lock()

    def _let_others_serve(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open_sqlite(self, make: bool) -> None:
        name = self._url.database
        if not name or name == ":memory:":
            raise SettingsError(f"Billing needs a file that stays. {_EXAMPLES}")
        if self._url.drivername not in _SQLITE or self._url != URL.create(self._url.drivername, database=name):
            told = without_password(self._url.render_as_string())
            raise SettingsError(
                f"`{told}`: of SQLite a file is named, and no driver, user, host or option. {_EXAMPLES}"
            )
        path = _file_of(self._url)
        if make:
            _require_writable(path)
        found = _tables_of(path)
        if found and _OURS - found:
            raise StartupError(f"{path} is another program's database. Give --database-url a file of its own.")
        if not found and not make:
            raise _no_store(str(path))
        if found is None:
            if not (path_of("--database-url", name).is_absolute() or path.parent.is_dir()):
                raise StartupError(
                    f"There is no folder {path.parent} for the billing database: sqlite:///{name} begins where the "
                    "command runs. Make the folder, or give the path from the root on, as sqlite:////absolute/path."
                )
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)
            except OSError as error:
                raise StartupError(f"The billing database {path} cannot be made: {error.strerror}.") from None
        url = self._url.set(drivername="sqlite+pysqlite", database=str(path))
        self._url = url
        arguments = {"isolation_level": None, "check_same_thread": False, "timeout": 5.0}
        self.writer = create_engine(
            url, connect_args=arguments, poolclass=QueuePool, pool_size=1, max_overflow=0, hide_parameters=True
        )
        self.reader = create_engine(
            url, connect_args=arguments, poolclass=QueuePool, pool_size=_READERS, hide_parameters=True
        )
        for engine in (self.writer, self.reader):
            event.listen(engine, "connect", _prepare_sqlite)
        event.listen(self.reader, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))

    def _open_postgresql(self) -> None:
        options = f"-c statement_timeout={STATEMENT_SECONDS}s -c idle_in_transaction_session_timeout=30s"
        arguments = {"connect_timeout": STATEMENT_SECONDS, "options": options, "application_name": "ernie-serve"}
        url = self._url.set(drivername="postgresql+psycopg")
        try:
            self.writer = self.reader = create_engine(
                url,
                connect_args=arguments,
                pool_size=_CONNECTIONS + _READERS,
                max_overflow=0,
                pool_timeout=STATEMENT_SECONDS,
                pool_recycle=1800,
                pool_pre_ping=True,
                hide_parameters=True,
            )
        except ModuleNotFoundError:
            raise StartupError(
                "PostgreSQL needs its driver: in a checkout `scripts/setup postgres` installs it, elsewhere "
                "`pip install 'psycopg[binary]'`."
            ) from None


_OURS = frozenset({"alembic_version", "account", "project", "api_key"})
"""Tables by which a store of any version is known."""

_SQLITE = ("sqlite", "sqlite+pysqlite")
_EXAMPLES = "Give sqlite:////absolute/path/billing.db or postgresql://user:password@host/name."
_UNHURRIED = text("SELECT set_config('statement_timeout', '0', true)")
_QUICKLY = text("SELECT set_config('synchronous_commit', 'off', true)")
_TAKE = text("SELECT 1 FROM account WHERE id = :id FOR UPDATE")
_TAKE_QUICKLY = text("SELECT set_config('synchronous_commit', 'off', true) FROM account WHERE id = :id FOR UPDATE")


def _no_store(where: str) -> StartupError:
    return StartupError(
        f"There is no billing store at {where}. `ernie-serve keys create` makes one; --database-url or "
        "ERNIE_SERVE_DATABASE_URL names another."
    )


def _require_writable(path: Path) -> None:
    """Whoever only tried to write would leave files behind that nobody can write either."""
    try:
        if not path.exists():
            return
        path = path.resolve()
        for each in (path.parent, path, Path(f"{path}-wal"), Path(f"{path}-shm")):
            if each.exists() and not os.access(each, os.W_OK):
                owner, we = each.stat().st_uid, os.geteuid()
                why = (
                    "its mode or its file system forbids it"
                    if owner == we
                    else f"user {owner} owns it, and we are {we}"
                )
                raise _not_writable(str(each), why)
    except OSError as error:
        raise _not_writable(str(path), error.strerror or str(error)) from None


def _not_writable(path: str, why: str) -> StartupError:
    return StartupError(
        f"The billing database cannot be written: {path}: {why}. Change its owner or mode, or give --database-url "
        "another."
    )


def _tables_of(path: Path) -> set[str] | None:
    """The tables of a SQLite file, of which nothing is changed; `None` where there is no file."""
    try:
        if not path.exists():
            return None
        real = path.resolve()
        # whoever has it open has a -wal beside it; where nobody does, even a reader would leave one
        mode = "ro" if Path(f"{real}-wal").exists() else "ro&immutable=1"
        with closing(sqlite3.connect(f"{real.as_uri()}?mode={mode}", uri=True)) as connection:
            return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except (OSError, sqlite3.Error) as error:
        raise StartupError(f"The billing database {path} cannot be used: {cause_of(error)}") from None


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL", "trusted_schema=OFF"):
        connection.execute(f"PRAGMA {pragma}")


def store_told(url: str) -> str:
    """Where a store is, in a word, and SQLite's by its file."""
    parsed = make_url(url)
    return f"SQLite {_file_of(parsed)}" if parsed.get_backend_name() == "sqlite" else "PostgreSQL"


def _file_of(url: URL) -> Path:
    return path_of("--database-url", url.database or "").absolute()


def _taken_apart(url: str) -> URL:
    """The parts of a database's URL. Raises `SettingsError`, which quotes nothing that may be a password."""
    with suppress(ArgumentError, ValueError):  # whose words would
        parsed = make_url(url)
        if "\0" not in url and "@" not in (parsed.host or ""):
            return parsed
    raise SettingsError(f"`{without_password(url)}` is no database URL. {_EXAMPLES} A password's @ is written %40.")


def without_password(url: str) -> str:
    """A database's URL as it may be shown: what cannot be a user, a password or an option of it."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        scheme = re.match(r"([a-z0-9+]{1,40})://", url)
        return f"{scheme[1]}://…" if scheme else "…" if set(url) & set(":@=") else url[:200]
    port = "" if parsed.port is None else f":{parsed.port}"
    _, at, tail = f"{parsed.host or ''}{port}/{parsed.database or ''}".rpartition("@")
    hidden = "…@" if at or parsed.username is not None or parsed.password is not None else ""
    return f"{parsed.drivername}://{hidden}{tail}"[:200]


def cause_of(error: Exception) -> str:
    """What the database's driver said, in a line."""
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0][:300]
