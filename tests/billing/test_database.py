"""Which databases are opened, how, and what is said of those that are not."""

import os
import re
import sqlite3
from contextlib import closing

import pytest

from ernie_serve.billing.accounts import ensure_account
from ernie_serve.billing.database import Database, store_told, without_password
from ernie_serve.errors import SettingsError, StartupError


@pytest.mark.parametrize("url", ["", "billing.db", "mysql://host/name", "sqlite://", "sqlite:///:memory:"])
def test_what_is_no_store_is_refused_with_examples(url):
    with pytest.raises(SettingsError, match=r"sqlite:////absolute/path/billing.db or postgresql://"):
        Database(url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p@host:abc/db",
        "postgresql://u:hunter2@[::1/db",
        "postgresql://u:hunter2/db",
        "postgresql://u:1@hunter2@host/db",
        "postgresql://u:hunter2@host/d\0b",
        "sqlite+pysqlcipher://:hunter2@//path.db",
        "sqlite://u:hunter2@host//path.db",
        "sqlite+aiosqlite:////path.db",
        "sqlite:////path.db?foo=hunter2",
        "sqlite:////path.db?timeout=long",
    ],
)
def test_a_url_that_cannot_be_meant_is_told_with_examples_and_no_secret(url):
    with pytest.raises(SettingsError, match=r"sqlite:////absolute/path/billing.db or postgresql://") as refused:
        Database(url, make=True)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://user:secret@host:5433/name?sslmode=require", "postgresql://…@host:5433/name"),
        ("postgresql://user:sec?ret@host/name", "postgresql://…@host/name"),
        ("postgresql://user/sec:ret@host/name", "postgresql://…@host/name"),
        ("postgresql://user:secret/name", "postgresql://…"),
        ("postgresql:///name?host=/run&password=secret", "postgresql:///name"),
        ("sqlite:////path/billing.db", "sqlite:////path/billing.db"),
        ("word", "word"),
        ("/path/billing.db", "/path/billing.db"),
        ("postgresql:/user:secret@host/name", "…"),
        ("user:secret@host://name", "…"),
        ("host=x password=secret dbname=name", "…"),
    ],
)
def test_a_url_is_shown_without_secrets(url, shown):
    assert without_password(url) == shown


def test_a_host_that_cannot_be_one_is_told():
    pytest.importorskip("psycopg")
    with pytest.raises(StartupError, match=r"postgresql://…@a\.\.b/name cannot be used: .*label empty"):
        Database("postgresql://u:hunter2@a..b/name")


def test_a_file_that_is_no_database_is_named(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("milk, eggs and everything else that no database begins with" * 100)
    with pytest.raises(StartupError, match=r"notes\.txt cannot be used: file is not a database"):
        Database(f"sqlite:///{path}")


def test_a_path_from_the_working_directory_makes_no_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartupError, match=rf"no folder {tmp_path}/var/lib .*, as sqlite:////absolute/path"):
        Database("sqlite:///var/lib/billing.db", make=True)
    assert list(tmp_path.iterdir()) == []
    Database("sqlite:///billing.db", make=True).close()
    Database(f"sqlite:///{tmp_path}/var/lib/billing.db", make=True).close()
    assert (tmp_path / "billing.db").exists()
    assert (tmp_path / "var/lib/billing.db").exists()


def test_a_store_is_told_by_its_whole_path_and_without_secrets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert store_told("sqlite:///here.db") == f"SQLite {tmp_path}/here.db"
    assert store_told("sqlite:////there.db") == "SQLite /there.db"
    assert store_told("postgresql://user:secret@host/name") == "PostgreSQL"


def test_a_home_that_is_nobody_s_is_told():
    told = r"--database-url ~nobodyhere/billing\.db: ~nobodyhere is nobody's home here\. Give the path from the root on"
    with pytest.raises(SettingsError, match=told):
        Database("sqlite:///~nobodyhere/billing.db", make=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="cannot be made"):
        Database(f"sqlite:///{tmp_path}/file/billing.db", make=True)


@pytest.mark.parametrize("make", [True, False])
@pytest.mark.parametrize("journal", ["wal", "delete"])
@pytest.mark.parametrize("table", ["account", "alembic_version", "notes"])
def test_another_program_s_database_is_refused_and_left_as_it_is(tmp_path, table, journal, make):
    path = tmp_path / "odd ?#%.db"
    plain = sqlite3.connect(path)
    plain.execute(f"PRAGMA journal_mode={journal}")
    plain.execute(f"CREATE TABLE {table} (id INTEGER)")
    plain.commit()
    plain.close()
    before = {each: (each.read_bytes(), each.stat().st_mtime_ns) for each in tmp_path.iterdir()}
    with pytest.raises(StartupError, match=r"another program's database. Give --database-url a file of its own"):
        Database(f"sqlite:///{path}".replace("?", "%3F"), make=make)
    assert {each: (each.read_bytes(), each.stat().st_mtime_ns) for each in tmp_path.iterdir()} == before


def test_a_store_whose_tables_are_still_in_its_log_is_known(tmp_path):
    url = f"sqlite:///{tmp_path / 'billing.db'}"
    server = Database(url, make=True)
    with closing(sqlite3.connect(f"file:{tmp_path / 'billing.db'}?immutable=1", uri=True)) as plain:
        assert plain.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    Database(url).close()
    server.close()
    Database(url).close()


def test_a_server_that_is_not_there_is_told_without_its_password():
    pytest.importorskip("psycopg")
    with pytest.raises(StartupError) as refused:
        Database("postgresql://me:hunter2@127.0.0.1:1/none")
    assert "hunter2" not in str(refused.value)
    assert "127.0.0.1:1" in str(refused.value)


def test_sqlite_waits_for_the_disk_where_it_matters(sqlite_url):
    database = Database(sqlite_url)
    for durable, level in ((True, 2), (False, 1), (True, 2)):
        with database.transaction(durable=durable, lane="") as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == level
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    database.close()


@pytest.mark.parametrize("with_account", [True, False])
def test_postgresql_waits_for_the_disk_where_it_matters(postgres_url, with_account):
    database = Database(postgres_url)
    with database.transaction(durable=True, lane="") as connection:
        lane = ensure_account(connection, "a", 1) if with_account else ""
    for durable, level in ((True, "on"), (False, "off"), (True, "on")):
        with database.transaction(durable=durable, lane=lane) as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == level
            assert connection.exec_driver_sql("SHOW statement_timeout").scalar() == "2s"
    database.close()


def test_one_server_has_a_sqlite_file_to_itself(sqlite_url):
    first, second = Database(sqlite_url), Database(sqlite_url)
    first.hold_alone()
    with pytest.raises(StartupError, match=r"Another server charges .* PostgreSQL"):
        second.hold_alone()
    first.close()
    second.hold_alone()
    second.close()


@pytest.mark.parametrize("name", ["{}", "{}-wal", ".."])
def test_a_file_that_cannot_be_written_is_named_before_it_is_opened(sqlite_url, monkeypatch, name):
    Database(sqlite_url, make=True).close()
    path = sqlite_url.removeprefix("sqlite:///")
    refused = os.path.dirname(path) if name == ".." else name.format(path)
    if not os.path.exists(refused):
        open(refused, "w").close()
    before = sorted(os.listdir(os.path.dirname(path)))
    may = os.access
    monkeypatch.setattr(os, "access", lambda each, mode: str(each) != refused and may(each, mode))
    with pytest.raises(
        StartupError, match=f"{re.escape(refused)}: its mode or its file system forbids it. Change its owner or mode"
    ):
        Database(sqlite_url, make=True)
    assert sorted(os.listdir(os.path.dirname(path))) == before


def test_a_folder_that_may_not_be_entered_is_told_in_a_line(sqlite_url, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.exists", refuse)
    with pytest.raises(StartupError, match=r"cannot be written: .*: Permission denied"):
        Database(sqlite_url, make=True)


def test_a_lock_that_cannot_be_taken_is_named(sqlite_url):
    database = Database(sqlite_url)
    os.mkdir(sqlite_url.removeprefix("sqlite:///") + ".lock")
    with pytest.raises(StartupError, match=r"\.lock: Is a directory"):
        database.hold_alone()
    database.close()


def test_a_link_to_a_sqlite_file_is_the_same_file(sqlite_url, tmp_path):
    first = Database(sqlite_url)
    (tmp_path / "link.db").symlink_to(sqlite_url.removeprefix("sqlite:///"))
    second = Database(f"sqlite:///{tmp_path / 'link.db'}")
    first.hold_alone()
    with pytest.raises(StartupError, match="Another server charges"):
        second.hold_alone()
    first.close()
    second.close()


def test_a_command_may_write_beside_the_server(sqlite_url):
    server, command = Database(sqlite_url), Database(sqlite_url)
    server.hold_alone()
    for each in (server, command):
        with each.transaction(durable=True, lane="") as connection:
            connection.exec_driver_sql(f"INSERT INTO boot VALUES ('{id(each)}', 1, 1)")
        each.close()
    plain = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))
    assert plain.execute("SELECT count(*) FROM boot").fetchone() == (2,)
    plain.close()
