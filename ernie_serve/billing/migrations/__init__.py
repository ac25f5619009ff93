"""Brings a database to the tables of `schema.py`, step by step, in one transaction.

Knows alembic. Knows no rule of the ledger. A step is a file in `versions/`; `tests/billing` holds that all of them
together make exactly `schema.py`.
"""

from pathlib import Path

from sqlalchemy import Connection, text

from ernie_serve.errors import StartupError

_LOCK = 4_520_611_017


def migrate(connection: Connection) -> None:
    """Apply what is missing. Raises `StartupError` for a database that a newer version has written."""
    from alembic.migration import MigrationContext  # slow to import, and of use only where a database is opened
    from alembic.operations import Operations
    from alembic.script import ScriptDirectory
    from alembic.script.revision import RevisionError

    if connection.dialect.name == "postgresql":
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
    with Operations.context(context):
        for step in reversed(missing):
            step.module.upgrade()
    context.stamp(scripts, "head")
