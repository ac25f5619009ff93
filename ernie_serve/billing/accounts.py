"""Accounts, projects and keys as SQL.

Knows the tables. Knows no thread and no clock. Names are for people; ids are made here and never change.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, Table, func, insert, or_, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from ernie_serve.billing.keys import Caller, KeyLimits, Scope, digest, new_key, parse_scopes
from ernie_serve.billing.schema import account, api_key, project
from ernie_serve.errors import SettingsError

DEFAULT_ACCOUNT = "default"
DEFAULT_PROJECT = "default"
_MAX_NAME = 128

KeyState = Literal["active", "disabled", "expired", "account closed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """A key as it is stored: everything about it but itself."""

    caller: Caller
    secret_sha256: str = field(repr=False)
    account_name: str
    project_name: str
    created: int
    disabled: int | None = None
    last_used: int | None = None
    account_active: bool = True

    def usable(self, now: int) -> bool:
        """Whether the key works at that time."""
        return self.state(now) == "active"

    def state(self, now: int) -> KeyState:
        """How the key stands at that time."""
        if self.disabled is not None:
            return "disabled"
        if not self.account_active:
            return "account closed"
        return "active" if self.caller.expires is None or now < self.caller.expires else "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountRecord:
    """An account: what is in it, and what of that is held for running requests."""

    id: str
    name: str
    balance_nano: int
    reserved_nano: int
    status: str
    created: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectRecord:
    """A project of an account, and what it may spend in a month."""

    id: str
    account_id: str
    name: str
    month_limit_nano: int | None
    created: int


def ensure_account(connection: Connection, name: str, now: int) -> str:
    """The id of the account of that name, made if there is none."""
    return _ensure(connection, account, {"name": _named(name, "account")}, "acct", now, _EMPTY)


def ensure_project(connection: Connection, account_id: str, name: str, now: int) -> str:
    """The id of an account's project of that name, made if there is none."""
    return _ensure(connection, project, {"account_id": account_id, "name": _named(name, "project")}, "proj", now, {})


def create_key(
    connection: Connection,
    project_id: str,
    name: str,
    now: int,
    *,
    scopes: tuple[Scope, ...],
    limits: KeyLimits = KeyLimits(),  # noqa: B008  # frozen
    expires: int | None = None,
) -> tuple[str, str]:
    """Make a key; return it, for the only time, and its public id."""
    key, public_id = new_key()
    values = {
        "public_id": public_id,
        "secret_sha256": digest(key),
        "project_id": project_id,
        "name": _named(name, "key"),
        "scopes": ",".join(scopes),
        "expires": expires,
        "created": now,
    }
    columns = {column: getattr(limits, name) for name, column in _LIMIT_COLUMNS.items()}
    connection.execute(insert(api_key).values(values | columns))
    return key, public_id


def set_limits(connection: Connection, key_id: str, changes: Mapping[str, int | None]) -> bool:
    """Change those limits of a key that are named as in `KeyLimits`. `False` when there is no such key."""
    columns = {_LIMIT_COLUMNS[name]: value for name, value in changes.items()}
    return bool(connection.execute(update(api_key).where(api_key.c.public_id == key_id).values(columns)).rowcount)


def disable_key(connection: Connection, key_id: str, now: int) -> bool:
    """Make a key useless. `False` when there is no such key."""
    change = update(api_key).where(api_key.c.public_id == key_id)
    return bool(connection.execute(change.values(disabled=func.coalesce(api_key.c.disabled, now))).rowcount)


def set_project_limit(connection: Connection, project_id: str, month_nano: int | None) -> bool:
    """Limit what a project may spend in a month. `False` when there is no such project."""
    change = update(project).where(project.c.id == project_id).values(month_limit_nano=month_nano)
    return bool(connection.execute(change).rowcount)


def set_account_status(connection: Connection, account_id: str, *, active: bool) -> bool:
    """Open or close an account, and with it all its keys. `False` when there is no such account."""
    change = update(account).where(account.c.id == account_id).values(status="active" if active else "disabled")
    return bool(connection.execute(change).rowcount)


def touch_key(connection: Connection, key_id: str, now: int) -> None:
    """Note that a key was used."""
    unseen = or_(api_key.c.last_used.is_(None), api_key.c.last_used < now)
    connection.execute(update(api_key).where(api_key.c.public_id == key_id, unseen).values(last_used=now))


def find_key(connection: Connection, key_id: str) -> KeyRecord | None:
    """A key by its public id."""
    return next(iter(_keys(connection, api_key.c.public_id == key_id)), None)


def list_keys(
    connection: Connection,
    account_id: str | None = None,
    *,
    project_id: str | None = None,
    after: str | None = None,
    limit: int | None = None,
) -> list[KeyRecord]:
    """Keys, oldest first: every one, or those of an account or project; `limit` of them after the key `after`."""
    conditions: list[ColumnElement[bool]] = []
    if account_id is not None:
        conditions.append(account.c.id == account_id)
    if project_id is not None:
        conditions.append(project.c.id == project_id)
    if after is not None:
        last = select(api_key.c.created, api_key.c.public_id).where(api_key.c.public_id == after)
        conditions.append(tuple_(api_key.c.created, api_key.c.public_id) > last.scalar_subquery())
    return _keys(connection, *conditions, limit=limit)


def list_projects(connection: Connection, account_id: str | None = None) -> list[ProjectRecord]:
    """Every project, or those of one account, oldest first."""
    query = select(project).order_by(project.c.created, project.c.id)
    rows = connection.execute(query if account_id is None else query.where(project.c.account_id == account_id))
    return [ProjectRecord(**row) for row in rows.mappings()]


def find_project(connection: Connection, project_id: str) -> ProjectRecord | None:
    """A project by its id."""
    row = connection.execute(select(project).where(project.c.id == project_id)).mappings().first()
    return None if row is None else ProjectRecord(**row)


def list_accounts(
    connection: Connection, *, name: str | None = None, after: str | None = None, limit: int | None = None
) -> list[AccountRecord]:
    """Accounts, oldest first: every one, or that of a name; `limit` of them after the account `after`."""
    query = select(account).order_by(account.c.created, account.c.id).limit(limit)
    if name is not None:
        query = query.where(account.c.name == name)
    if after is not None:
        last = select(account.c.created, account.c.id).where(account.c.id == after)
        query = query.where(tuple_(account.c.created, account.c.id) > last.scalar_subquery())
    return [AccountRecord(**row) for row in connection.execute(query).mappings()]


def find_account(connection: Connection, account_id: str) -> AccountRecord | None:
    """An account by its id."""
    row = connection.execute(select(account).where(account.c.id == account_id)).mappings().first()
    return None if row is None else AccountRecord(**row)


_EMPTY: dict[str, int | str] = {"balance_nano": 0, "reserved_nano": 0, "status": "active"}


def _ensure(
    connection: Connection, table: Table, who: dict[str, str], prefix: str, now: int, others: dict[str, int | str]
) -> str:
    """The id of the row that `who` names, inserted unless another has just done so."""
    row = who | others | {"id": f"{prefix}_{secrets.token_hex(8)}", "created": now}
    connection.execute(_INSERT[connection.dialect.name](table).values(row).on_conflict_do_nothing())
    named = select(table.c.id).where(*(table.c[name] == value for name, value in who.items()))
    return str(connection.execute(named).scalar_one())


_INSERT: dict[str, type[sqlite.Insert] | type[postgresql.Insert]] = {
    "sqlite": sqlite.Insert,
    "postgresql": postgresql.Insert,
}


def _keys(connection: Connection, *conditions: ColumnElement[bool], limit: int | None = None) -> list[KeyRecord]:
    columns = (
        api_key,
        account.c.id.label("account_id"),
        account.c.name.label("account_name"),
        account.c.status,
        project.c.name.label("project_name"),
        project.c.month_limit_nano.label("project_month_nano"),
    )
    joined = api_key.join(project, project.c.id == api_key.c.project_id).join(
        account, account.c.id == project.c.account_id
    )
    query = select(*columns).select_from(joined).where(*conditions).order_by(api_key.c.created, api_key.c.public_id)
    return [_key_record(row) for row in connection.execute(query.limit(limit))]


def _key_record(row: Row[Any]) -> KeyRecord:
    limits = KeyLimits(
        requests_per_minute=row.rpm,
        tokens_per_minute=row.tpm,
        concurrent=row.concurrent,
        month_nano=row.month_limit_nano,
    )
    caller = Caller(
        account_id=row.account_id,
        project_id=row.project_id,
        key_id=row.public_id,
        key_name=row.name,
        scopes=frozenset(parse_scopes(row.scopes)),
        limits=limits,
        project_month_nano=row.project_month_nano,
        expires=row.expires,
    )
    return KeyRecord(
        caller=caller,
        secret_sha256=row.secret_sha256,
        account_name=row.account_name,
        project_name=row.project_name,
        created=row.created,
        disabled=row.disabled,
        last_used=row.last_used,
        account_active=row.status == "active",
    )


_LIMIT_COLUMNS = {
    "requests_per_minute": "rpm",
    "tokens_per_minute": "tpm",
    "concurrent": "concurrent",
    "month_nano": "month_limit_nano",
}


def _named(name: str, what: str) -> str:
    if not name.strip() or len(name) > _MAX_NAME or not name.isprintable():
        raise SettingsError(f"The name of the {what} has {len(name)} characters; give 1 to {_MAX_NAME} printable ones.")
    return name.strip()
