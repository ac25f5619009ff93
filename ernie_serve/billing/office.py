"""What whoever runs the server does to accounts and keys, each in one step: the command line and the admin routes.

Knows the order of the small steps in `accounts.py` and `ledger.py`. Each function runs in one transaction; names and
amounts are as a person gives them.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection

from ernie_serve.billing import accounts, ledger
from ernie_serve.billing.accounts import DEFAULT_ACCOUNT, DEFAULT_PROJECT, AccountRecord
from ernie_serve.billing.database import Database
from ernie_serve.billing.keys import DEFAULT_SCOPES, KeyLimits, Scope
from ernie_serve.billing.money import format_usd
from ernie_serve.errors import SettingsError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key that was just made. `key` is nowhere else: show it once."""

    key: str
    key_id: str
    account_id: str
    project_id: str
    balance_nano: int


class Office:
    """A database for one command: `office(open_key, "laptop", now=…)` runs that in a transaction of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def __call__(self, do: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function of this file, `accounts` or `reports`."""
        with self._database.transaction(durable=True, lane="") as connection:
            return do(connection, *args, **kwargs)


@contextmanager
def office(url: str) -> Iterator[Office]:
    """Open the store at `url` for a command. Raises `StartupError` where it cannot be used."""
    database = Database(url)
    try:
        yield Office(database)
    finally:
        database.close()


def open_key(
    connection: Connection,
    name: str,
    *,
    now: int,
    account: str = DEFAULT_ACCOUNT,
    project: str = DEFAULT_PROJECT,
    credit_nano: int = 0,
    scopes: tuple[Scope, ...] = DEFAULT_SCOPES,
    limits: KeyLimits = KeyLimits(),  # noqa: B008  # frozen
    expires: int | None = None,
) -> NewKey:
    """Make a key, with its account and project where they are new, and put credit into the account."""
    account_id = accounts.ensure_account(connection, account, now)
    project_id = accounts.ensure_project(connection, account_id, project, now)
    key, key_id = accounts.create_key(connection, project_id, name, now, scopes=scopes, limits=limits, expires=expires)
    balance = top_up(connection, account_id, credit_nano, now=now, ref=f"credit:{key_id}")
    return NewKey(key=key, key_id=key_id, account_id=account_id, project_id=project_id, balance_nano=balance)


def top_up(
    connection: Connection, account: str, nano: int, *, now: int, kind: str = "topup", ref: str | None = None
) -> int:
    """Add to an account, named by id or name, once for each `ref`; return its balance.

    Raises `SettingsError` for an account that is not there, and where running requests hold what is to be taken.
    """
    record = the_account(connection, account)
    if nano == 0:
        return record.balance_nano
    ref = f"{kind}:{secrets.token_hex(8)}" if ref is None else ref
    balance = ledger.top_up(connection, record.id, nano, kind, ref, now)
    if balance is None:
        raise SettingsError(
            f"The account {record.name} has {format_usd(record.balance_nano)} USD, of which running requests hold "
            f"{format_usd(record.reserved_nano)}; {format_usd(-nano)} cannot be taken."
        )
    return balance


def the_account(connection: Connection, account: str) -> AccountRecord:
    """An account by id or name. Raises `SettingsError` when there is none."""
    for record in accounts.list_accounts(connection):
        if account in (record.id, record.name):
            return record
    raise SettingsError(f"There is no account `{account[:80]}`. `ernie-serve keys create` makes one.")
