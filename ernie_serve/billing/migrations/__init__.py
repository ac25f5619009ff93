"""Brings a database to the tables of `schema.py`, step by step, in one transaction.

Knows alembic. Knows no rule of the ledger. A step is a file in `versions/`; `tests/billing` holds that all of them
together make exactly `schema.py`.
"""

from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection, text

from ernie_serve.errors import StartupError

_LOCK = 4_520_611_017


def migrate(connection: Connection, is_served: Callable[[Connection], bool]) -> None:
    """Apply what is missing.

    Raises `StartupError` for a database that a newer version has written, and for one of an older version that
    `is_served` says a server still uses: its charges would fail on tables that it does not know.
    """
    from alembic.migration import MigrationContext  # slow to import, and of use only where a database is opened
    from alembic.operations import Operations
    from alembic.script import ScriptDirectory
    from alembic.script.revision import RevisionError

    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL statement_timeout = 0"))  # a step takes as long as its tables are large
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    scripts = ScriptDirectory(Path(__file__).parent)
    context = MigrationContext.configure(connection)
    current = context.get_current_revision()
    if current == scripts.get_current_head():
        return
    try:
        missing = list(scripts.iterate_revisions("head", current or "base"))
    except RevisionError:
        raise StartupError(
            f"The billing database is at revision {current}, which this version does not know. "
            "Run the version that wrote it, or a newer one."
        ) from None
    if current is not None and is_served(connection):
        raise StartupError(
            f"A server of an older version charges to this billing database, which is at revision {current} and has to "
            "be changed. Stop every server on it first; one that was killed counts as stopped after a minute."
        )
    with Operations.context(context):
        for step in reversed(missing):
            step.module.upgrade()
    context.stamp(scripts, "head")
