"""A statement that every request runs, without what SQLAlchemy does around each run where that is most of its cost.

Knows statements and drivers. Knows no table. In SQLite such a statement takes microseconds and SQLAlchemy some fifty
around it, while all others in its transaction wait; so it is spelled once and handed to the driver as it is, its values
by place: for a value with a name the driver gives the interpreter's lock away and takes it again. In PostgreSQL the way
to the server is most of it, and SQLAlchemy runs it as ever.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Delete, Insert, Select, Update
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import IntegrityError


class Prepared:
    """One statement of Core; an insert that leaves columns to the database comes with the names of the others."""

    def __init__(self, statement: Select[Any] | Update | Insert | Delete, columns: Sequence[str] | None = None) -> None:
        self._statement = statement
        compiled = statement.compile(dialect=sqlite.dialect(paramstyle="qmark"), column_keys=columns)
        self._text = str(compiled)
        self._names = compiled.positiontup or []
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}

    def value(self, connection: Connection, given: Mapping[str, Any]) -> Any:
        """The first column of the only row, `None` without one."""
        rows = self.rows(connection, given)
        return rows[0][0] if rows else None

    def rows(self, connection: Connection, given: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """All rows. A list is given for a parameter that is `expanding`; there may be one such."""
        if connection.dialect.name != "sqlite":
            return connection.execute(self._statement, dict(given)).fetchall()
        return self._run(connection, given).fetchall()

    def changed(self, connection: Connection, given: Mapping[str, Any]) -> int:
        """How many rows an update changed; of an insert that is not told."""
        if connection.dialect.name != "sqlite":
            return int(connection.execute(self._statement, dict(given)).rowcount)
        return self._run(connection, given).rowcount

    def inserted(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert rows, in SQLite by one statement with a group of values for each."""
        if connection.dialect.name != "sqlite":
            connection.execute(self._statement, [dict(row) for row in rows])
            return
        head, values, row = self._text.partition(" VALUES ")
        text = head + values + ", ".join([row] * len(rows))
        _execute(connection, text, [row[name] for row in rows for name in self._names])

    def _run(self, connection: Connection, given: Mapping[str, Any]) -> sqlite3.Cursor:
        text, values = self._text, []
        for name in self._names:
            value = given[name] if name in given else self._constants[name]
            if isinstance(value, list):
                text = text.replace(f"__[POSTCOMPILE_{name}]", ", ".join("?" * len(value)))
                values += value
            else:
                values.append(value)
        return _execute(connection, text, values)


def _execute(connection: Connection, text: str, values: list[Any]) -> sqlite3.Cursor:
    raw: Any = connection.connection.driver_connection
    try:
        cursor: sqlite3.Cursor = raw.execute(text, values)
    except sqlite3.IntegrityError as error:
        raise IntegrityError(text, None, error) from error
    return cursor
