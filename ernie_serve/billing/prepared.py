"""A statement that every request runs, without what SQLAlchemy does around each run where that is most of its cost.

Knows statements and drivers. Knows no table. In SQLite such a statement takes microseconds and SQLAlchemy some fifty
around it, while all others in its transaction wait; so it is spelled once and handed to the driver as it is. In
PostgreSQL the way to the server is most of it, and SQLAlchemy runs it as ever.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Insert, Select, Update
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import IntegrityError


class Prepared:
    """One statement of Core; an insert that leaves columns to the database comes with the names of the others."""

    def __init__(self, statement: Select[Any] | Update | Insert, columns: Sequence[str] | None = None) -> None:
        self._statement = statement
        compiled = statement.compile(dialect=sqlite.dialect(paramstyle="named"), column_keys=columns)
        self._text = str(compiled)
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}

    def value(self, connection: Connection, given: Mapping[str, Any]) -> Any:
        """The first column of the only row, `None` without one."""
        if connection.dialect.name != "sqlite":
            return connection.execute(self._statement, dict(given)).scalar()
        rows = self._run(connection, given).fetchall()
        return rows[0][0] if rows else None

    def changed(self, connection: Connection, given: Mapping[str, Any]) -> int:
        """How many rows an update changed; of an insert that is not told."""
        if connection.dialect.name != "sqlite":
            return int(connection.execute(self._statement, dict(given)).rowcount)
        return self._run(connection, given).rowcount

    def _run(self, connection: Connection, given: Mapping[str, Any]) -> sqlite3.Cursor:
        raw: Any = connection.connection.driver_connection
        try:
            cursor: sqlite3.Cursor = raw.execute(self._text, {**self._constants, **given})
        except sqlite3.IntegrityError as error:
            raise IntegrityError(self._text, None, error) from error
        return cursor
