"""The first tables: accounts, keys, prices, reservations, usage and the ledger."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make every table of the first version."""
    op.create_table(
        "account",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("balance_nano", _INT64, nullable=False),
        sa.Column("reserved_nano", _INT64, nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created", _INT64, nullable=False),
        sa.CheckConstraint("status IN ('active', 'disabled')", name="account_status"),
        sa.CheckConstraint("balance_nano >= reserved_nano", name="account_overdraft"),
        sa.CheckConstraint("reserved_nano >= 0", name="account_reserved"),
        sa.PrimaryKeyConstraint("id"),
        sqlite_strict=True,
    )
    op.create_index("account_name", "account", ["name"], unique=True)
    op.create_table(
        "boot",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("started", _INT64, nullable=False),
        sa.Column("heartbeat", _INT64, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sqlite_strict=True,
    )
    op.create_table(
        "idempotency",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("key_sha256", sa.Text(), nullable=False),
        sa.Column("body_sha256", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.Column("expires", _INT64, nullable=False),
        sa.CheckConstraint("state IN ('running', 'finished')", name="idempotency_state"),
        sa.PrimaryKeyConstraint("key_id", "key_sha256"),
        sqlite_strict=True,
    )
    op.create_index("idempotency_expires", "idempotency", ["expires"], unique=False)
    op.create_index("idempotency_request", "idempotency", ["request_id"], unique=False)
    op.create_table(
        "price",
        sa.Column("version", _INT64, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("nano_per_token", _INT64, nullable=False),
        sa.Column("valid_from", _INT64, nullable=False),
        sa.CheckConstraint("kind IN ('input', 'cached', 'output')", name="price_kind"),
        sa.CheckConstraint("nano_per_token >= 0", name="price_positive"),
        sa.PrimaryKeyConstraint("version", "kind"),
        sqlite_strict=True,
    )
    op.create_index("price_model", "price", ["model", "version"], unique=False)
    op.create_table(
        "usage_day",
        sa.Column("day", _INT64, nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("requests", _INT64, nullable=False),
        sa.Column("prompt", _INT64, nullable=False),
        sa.Column("cached", _INT64, nullable=False),
        sa.Column("completion", _INT64, nullable=False),
        sa.Column("reasoning", _INT64, nullable=False),
        sa.Column("cost_nano", _INT64, nullable=False),
        sa.PrimaryKeyConstraint("day", "account_id", "project_id", "key_id", "model"),
        sqlite_strict=True,
    )
    op.create_index("usage_day_account", "usage_day", ["account_id", "day"], unique=False)
    op.create_table(
        "ledger",
        sa.Column("id", _INT64, autoincrement=True, nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("delta_nano", _INT64, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("ref", sa.Text(), nullable=False),
        sa.Column("created", _INT64, nullable=False),
        sa.CheckConstraint("kind IN ('topup', 'usage', 'refund', 'adjust')", name="ledger_kind"),
        sa.ForeignKeyConstraint(
            ["account_id"],
            ["account.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sqlite_strict=True,
    )
    op.create_index("ledger_account", "ledger", ["account_id", "id"], unique=False)
    op.create_index("ledger_ref", "ledger", ["ref"], unique=True)
    op.create_table(
        "project",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("month_limit_nano", _INT64, nullable=True),
        sa.Column("created", _INT64, nullable=False),
        sa.ForeignKeyConstraint(
            ["account_id"],
            ["account.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sqlite_strict=True,
    )
    op.create_index("project_name", "project", ["account_id", "name"], unique=True)
    op.create_table(
        "reservation",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("amount_nano", _INT64, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.Column("created", _INT64, nullable=False),
        sa.CheckConstraint("state IN ('open', 'settled', 'released')", name="reservation_state"),
        sa.CheckConstraint("amount_nano >= 0", name="reservation_amount"),
        sa.ForeignKeyConstraint(
            ["account_id"],
            ["account.id"],
        ),
        sa.PrimaryKeyConstraint("request_id"),
        sqlite_strict=True,
    )
    op.create_index("reservation_state", "reservation", ["state", "account_id"], unique=False)
    op.create_table(
        "usage_event",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("price_version", _INT64, nullable=False),
        sa.Column("prompt", _INT64, nullable=False),
        sa.Column("cached", _INT64, nullable=False),
        sa.Column("completion", _INT64, nullable=False),
        sa.Column("reasoning", _INT64, nullable=False),
        sa.Column("cost_nano", _INT64, nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("finish_reason", sa.Text(), nullable=True),
        sa.Column("ttft_us", _INT64, nullable=True),
        sa.Column("total_us", _INT64, nullable=True),
        sa.Column("created", _INT64, nullable=False),
        sa.CheckConstraint("status IN ('ok', 'cancelled', 'failed')", name="usage_event_status"),
        sa.CheckConstraint("cost_nano >= 0", name="usage_event_cost"),
        sa.ForeignKeyConstraint(
            ["account_id"],
            ["account.id"],
        ),
        sa.PrimaryKeyConstraint("request_id"),
        sqlite_strict=True,
    )
    op.create_index("usage_event_account", "usage_event", ["account_id", "created", "request_id"], unique=False)
    op.create_index("usage_event_created", "usage_event", ["created", "request_id"], unique=False)
    op.create_table(
        "api_key",
        sa.Column("public_id", sa.Text(), nullable=False),
        sa.Column("secret_sha256", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("rpm", _INT64, nullable=True),
        sa.Column("tpm", _INT64, nullable=True),
        sa.Column("concurrent", _INT64, nullable=True),
        sa.Column("month_limit_nano", _INT64, nullable=True),
        sa.Column("expires", _INT64, nullable=True),
        sa.Column("disabled", _INT64, nullable=True),
        sa.Column("last_used", _INT64, nullable=True),
        sa.Column("created", _INT64, nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"],
            ["project.id"],
        ),
        sa.PrimaryKeyConstraint("public_id"),
        sqlite_strict=True,
    )
    op.create_index("api_key_project", "api_key", ["project_id"], unique=False)
