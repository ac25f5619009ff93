"""The steps of `migrations/` make the tables of `schema.py`, in both databases."""

import fcntl
import os
import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, select

from ernie_serve.billing import migrations
from ernie_serve.billing.database import Database
from ernie_serve.billing.migrations.versions import v0001_ledger
from ernie_serve.billing.schema import metadata, reservation
from ernie_serve.errors import StartupError


def test_the_steps_make_the_tables(url):
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        found = inspect(connection)
        for table in metadata.tables.values():
            checks = {check["name"] for check in found.get_check_constraints(table.name)}
            assert checks == {c.name for c in table.constraints if type(c).__name__ == "CheckConstraint"}
    engine.dispose()


def test_migrating_again_changes_nothing(url):
    for _ in range(2):
        Database(url).close()


def test_a_store_is_made_only_where_that_is_asked_for(old_url):
    file = Path(old_url.removeprefix("sqlite:///"))
    with pytest.raises(StartupError, match=r"There is no billing store at .* `ernie-serve keys create` makes one"):
        Database(old_url)
    assert not file.exists()
    Database(old_url, make=True).close()
    Database(old_url).close()


def test_holds_that_run_outlive_the_second_step_and_those_that_ended_are_gone(old_url):
    engine = first_version(old_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO account VALUES ('a', 'a', 100, 7, 'active', 0)")
        for name, amount, state in (("r1", 7, "open"), ("r2", 8, "settled"), ("r3", 9, "released")):
            values = f"'{name}', 'a', 'p', 'k', {amount}, '{state}', 'b', 5"
            connection.exec_driver_sql(f"INSERT INTO reservation VALUES ({values})")
    Database(old_url).close()
    with engine.connect() as connection:
        assert [tuple(row) for row in connection.execute(select(reservation))] == [("r1", "a", "p", "k", 7, "b", 5)]
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_tables_are_not_changed_under_a_server_that_lives(old_url):
    engine = first_version(old_url)
    lock = None
    if engine.dialect.name == "sqlite":  # a server has the file's lock, and on PostgreSQL a heartbeat
        lock = os.open(f"{engine.url.database}.lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX)
    else:
        with engine.begin() as connection:
            beat = "INSERT INTO boot SELECT %s, 1, EXTRACT(EPOCH FROM clock_timestamp())::bigint - %s"
            connection.exec_driver_sql(beat, ("living", 50))
            connection.exec_driver_sql(beat, ("dead", 100))
    with pytest.raises(StartupError, match="Stop every server on it first"):
        Database(old_url)
    with engine.connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == "0001"
        assert connection.exec_driver_sql("SELECT count(state) FROM reservation").scalar_one() == 0
    if lock is None:
        with engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM boot WHERE id = 'living'")
    else:
        os.close(lock)
    database = Database(old_url)
    if database.embedded:
        database.hold_alone()  # whoever only opened it keeps no server from it
        Database(old_url).close()
    database.close()
    engine.dispose()


def first_version(url):
    """An engine on a database with the tables of the first step."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        context = MigrationContext.configure(connection)
        with Operations.context(context):
            v0001_ledger.upgrade()
        context.stamp(ScriptDirectory(Path(migrations.__file__).parent), "0001")
    return engine


@pytest.fixture(params=["sqlite", "postgresql"])
def old_url(request, tmp_path):
    """A database without a table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'old.db'}"
        return
    url = request.getfixturevalue("postgres")
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE old")
        yield url.replace("/postgres?", "/old?")
        connection.exec_driver_sql("DROP DATABASE old")
    engine.dispose()


def test_a_database_of_a_newer_version_is_left_alone(sqlite_url):
    plain = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))
    plain.execute("UPDATE alembic_version SET version_num = '9999'")
    plain.commit()
    plain.close()
    with pytest.raises(StartupError, match="revision 9999, which this version does not know"):
        Database(sqlite_url)


def test_sqlite_checks_the_types(sqlite_url):
    plain = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))
    strict = {row[1]: row[5] for row in plain.execute("PRAGMA table_list") if row[1] in metadata.tables}
    assert set(strict) == set(metadata.tables)
    assert set(strict.values()) == {1}
    with pytest.raises(sqlite3.IntegrityError, match="cannot store REAL"):
        plain.execute("INSERT INTO account VALUES ('a', 'a', 0.5, 0, 'active', 0)")
    plain.close()


def test_a_failed_step_leaves_nothing_behind(tmp_path, monkeypatch):
    from ernie_serve.billing import database as module

    def broken(connection, is_served):
        connection.exec_driver_sql("CREATE TABLE half (id INTEGER)")
        raise RuntimeError

    path = tmp_path / "new.db"
    with monkeypatch.context() as patch:
        patch.setattr(module, "migrate", broken)
        with pytest.raises(RuntimeError):
            Database(f"sqlite:///{path}", make=True)
    plain = sqlite3.connect(path)
    assert plain.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    plain.close()
    assert Path(path).stat().st_mode & 0o077 == 0
