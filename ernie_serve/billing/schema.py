"""The tables.

Knows SQL names and types. Knows no rule: those are in `ledger.py` and `accounts.py`. Money is nano-USD and time is
seconds since 1970, both 64-bit integers; no column holds text of a request. The same tables serve SQLite (which checks
types, being STRICT) and PostgreSQL; `migrations/` brings an older database here.

    account ─┬─ project ─── api_key         who
             ├─ reservation ─── boot        money held while a request runs, and by which process; gone when it ends
             ├─ usage_event ─── usage_day   what was computed; the second is the first, added up
             └─ ledger                      every change of a balance, never changed itself
    price                                   what a token cost from when on
    idempotency                             which request answered a client's key
"""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    literal_column,
)
from sqlalchemy.schema import SchemaItem
from sqlalchemy.types import TypeEngine

metadata = MetaData()


def _int64() -> TypeEngine[int]:
    return BigInteger().with_variant(Integer(), "sqlite")


def _number(name: str, *extra: SchemaItem, nullable: bool = False, primary_key: bool = False) -> Column[int]:
    return Column(name, _int64(), *extra, nullable=nullable, primary_key=primary_key)


def _text(name: str, *extra: SchemaItem, nullable: bool = False, primary_key: bool = False) -> Column[str]:
    return Column(name, Text(), *extra, nullable=nullable, primary_key=primary_key)


def _table(name: str, *items: SchemaItem, in_order: bool = False) -> Table:
    """`in_order` keeps SQLite's rows where their primary key is, without an index beside them."""
    return Table(name, metadata, *items, sqlite_strict=True, sqlite_with_rowid=not in_order)


account = _table(
    "account",
    _text("id", primary_key=True),
    _text("name"),
    _number("balance_nano"),
    _number("reserved_nano"),
    _text("status"),
    _number("created"),
    CheckConstraint("reserved_nano >= 0", name="account_reserved"),
    CheckConstraint("balance_nano >= reserved_nano", name="account_overdraft"),
    CheckConstraint("status IN ('active', 'disabled')", name="account_status"),
    Index("account_name", "name", unique=True),
)

project = _table(
    "project",
    _text("id", primary_key=True),
    _text("account_id", ForeignKey("account.id")),
    _text("name"),
    _number("month_limit_nano", nullable=True),
    _number("created"),
    Index("project_name", "account_id", "name", unique=True),
)

api_key = _table(
    "api_key",
    _text("public_id", primary_key=True),
    _text("secret_sha256"),
    _text("project_id", ForeignKey("project.id")),
    _text("name"),
    _text("scopes"),
    _number("rpm", nullable=True),
    _number("tpm", nullable=True),
    _number("concurrent", nullable=True),
    _number("month_limit_nano", nullable=True),
    _number("expires", nullable=True),
    _number("disabled", nullable=True),
    _number("last_used", nullable=True),
    _number("created"),
    Index("api_key_project", "project_id"),
)

price = _table(
    "price",
    _number("version", primary_key=True),
    _text("kind", primary_key=True),
    _text("model"),
    _number("nano_per_token"),
    _number("valid_from"),
    CheckConstraint("kind IN ('input', 'cached', 'output')", name="price_kind"),
    CheckConstraint("nano_per_token >= 0", name="price_positive"),
    Index("price_model", "model", "version"),
)

boot = _table("boot", _text("id", primary_key=True), _number("started"), _number("heartbeat"))

reservation = _table(
    "reservation",
    _text("request_id", primary_key=True),
    _text("account_id", ForeignKey("account.id")),
    _text("project_id"),
    _text("key_id"),
    _number("amount_nano"),
    _text("boot_id"),
    _number("created"),
    CheckConstraint("amount_nano >= 0", name="reservation_amount"),
    in_order=True,
)

usage_event = _table(
    "usage_event",
    _text("request_id", primary_key=True),
    _text("account_id", ForeignKey("account.id")),
    _text("project_id"),
    _text("key_id"),
    _text("model"),
    _number("price_version"),
    _number("prompt"),
    _number("cached"),
    _number("completion"),
    _number("reasoning"),
    _number("cost_nano"),
    _text("status"),
    _text("finish_reason", nullable=True),
    _number("ttft_us", nullable=True),
    _number("total_us", nullable=True),
    _number("created"),
    CheckConstraint("cost_nano >= 0", name="usage_event_cost"),
    CheckConstraint("status IN ('ok', 'cancelled', 'failed')", name="usage_event_status"),
    Index("usage_event_account", "account_id", "created", "request_id"),
    Index("usage_event_created", "created", "request_id"),
)

usage_day = _table(
    "usage_day",
    _number("day", primary_key=True),
    _text("account_id", primary_key=True),
    _text("project_id", primary_key=True),
    _text("key_id", primary_key=True),
    _text("model", primary_key=True),
    _number("requests"),
    _number("prompt"),
    _number("cached"),
    _number("completion"),
    _number("reasoning"),
    _number("cost_nano"),
    Index("usage_day_account", "account_id", "day"),
)

ledger = _table(
    "ledger",
    Column("id", _int64(), primary_key=True, autoincrement=True),
    _text("account_id", ForeignKey("account.id")),
    _number("delta_nano"),
    _text("kind"),
    _text("ref"),
    _number("created"),
    CheckConstraint("kind IN ('topup', 'usage', 'refund', 'adjust')", name="ledger_kind"),
    Index("ledger_ref", "ref", unique=True),
    Index("ledger_account", "account_id", "id"),
)
BY_HAND = ledger.c.kind != literal_column("'usage'")
"""Entries that are no request's. Spelled out, because a statement only uses the index whose words it has."""
Index("ledger_by_hand", ledger.c.id, sqlite_where=BY_HAND, postgresql_where=BY_HAND)

idempotency = _table(
    "idempotency",
    _text("key_id", primary_key=True),
    _text("key_sha256", primary_key=True),
    _text("body_sha256"),
    _text("request_id"),
    _text("state"),
    _text("boot_id"),
    _number("expires"),
    CheckConstraint("state IN ('running', 'finished')", name="idempotency_state"),
    Index("idempotency_expires", "expires"),
    Index("idempotency_request", "request_id"),
)
