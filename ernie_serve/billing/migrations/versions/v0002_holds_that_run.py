"""Reservations are of requests that run: one that has ended has none, rather than one that says so."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Keep what is open, without saying so. SQLite's table is made anew: in the order of its key, with no index."""
    if op.get_context().dialect.name != "sqlite":
        op.execute("DELETE FROM reservation WHERE state <> 'open'")
        op.drop_index("reservation_state", "reservation")
        op.drop_column("reservation", "state")  # and the check with it
        return
    op.create_table(
        "held",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("amount_nano", _INT64, nullable=False),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.Column("created", _INT64, nullable=False),
        sa.CheckConstraint("amount_nano >= 0", name="reservation_amount"),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"]),
        sa.PrimaryKeyConstraint("request_id"),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.execute(
        "INSERT INTO held SELECT request_id, account_id, project_id, key_id, amount_nano, boot_id, created "
        "FROM reservation WHERE state = 'open'"
    )
    op.drop_table("reservation")
    op.rename_table("held", "reservation")
