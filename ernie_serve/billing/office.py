"""What whoever runs the server does to accounts and keys, each in one step: the command line and the admin routes.

Knows the order of the small steps in `accounts.py` and `ledger.py`. Each function runs in one transaction; names and
amounts are as a person gives them.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection

from ernie_serve.billing import accounts, bookings, ledger
from ernie_serve.billing.accounts import DEFAULT_ACCOUNT, DEFAULT_PROJECT, AccountRecord, KeyRecord
from ernie_serve.billing.database import Database, cause_of
from ernie_serve.billing.keys import DEFAULT_SCOPES, END_OF_TIME, KeyLimits, Scope, public_id_of
from ernie_serve.billing.money import MAX_NANO, format_usd
from ernie_serve.billing.store import is_away
from ernie_serve.errors import SettingsError, StartupError

P = ParamSpec("P")
T = TypeVar("T")

KINDS = ("topup", "refund", "adjust")
"""What a person books; requests are booked as `usage`."""


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
        """Run a function of this file or of `accounts`."""
        with self._database.transaction(durable=True, lane="") as connection:
            return do(connection, *args, **kwargs)

    def read(self, do: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function of `reports`, or a reading one of `accounts`, on one moment, beside whoever writes."""
        with self._database.moment() as connection:
            return do(connection, *args, **kwargs)


@contextmanager
def office(url: str, *, make: bool = False) -> Iterator[Office]:
    """Open the store at `url` for a command, beside a server or without; with `make` it is made where there is none.

    Raises `StartupError` where it fails.
    """
    database = Database(url, make=make)
    try:
        yield Office(database)
    except Exception as error:
        if not is_away(error):
            raise
        raise StartupError(f"The billing store failed, and nothing was changed: {cause_of(error)}") from None
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
    """Make a key, with its account and project where they are new, and put credit into the account.

    Raises `SettingsError` for a key that would expire after the year 9999, in which times as text end.
    """
    if expires is not None and expires >= END_OF_TIME:
        raise SettingsError("The key would expire after the year 9999. Give an earlier time, or none.")
    account_id = accounts.ensure_account(connection, account, now)
    project_id = accounts.ensure_project(connection, account_id, project, now)
    key, key_id = accounts.create_key(connection, project_id, name, now, scopes=scopes, limits=limits, expires=expires)
    balance = top_up(connection, account_id, credit_nano, now=now, ref=f"credit:{key_id}")
    return NewKey(key=key, key_id=key_id, account_id=account_id, project_id=project_id, balance_nano=balance)


def top_up(
    connection: Connection, account: str, nano: int, *, now: int, kind: str = "topup", ref: str | None = None
) -> int:
    """Add to an account, named by id or name, once for each `ref`; return its balance.

    Raises `SettingsError` for an account that is not there, where running requests hold what is to be taken, and where
    `ref` stands for something else.
    """
    if kind not in KINDS:
        raise SettingsError(f"The kind of a booking is `{kind[:40]}`; choose {', '.join(KINDS)}.")
    if nano < 0 and kind == "topup":
        raise SettingsError("The amount is below zero. To take credit away choose the kind adjust.")
    record = the_account(connection, account)
    if nano == 0:
        return record.balance_nano
    if record.balance_nano + nano > MAX_NANO:
        raise SettingsError(
            f"The account {record.name} has {format_usd(record.balance_nano)} USD; {format_usd(nano)} more is more "
            f"than the ledger can hold ({format_usd(MAX_NANO)})."
        )
    ref = f"{kind}:{secrets.token_hex(8)}" if ref is None else ref
    balance = ledger.top_up(connection, record.id, nano, kind, ref, now)
    if balance is None:
        raise SettingsError(
            f"The account {record.name} has {format_usd(record.balance_nano)} USD, of which running requests hold "
            f"{format_usd(record.reserved_nano)}; {format_usd(-nano)} cannot be taken."
        )
    booked = bookings.find_booking(connection, ref)
    assert booked is not None, "it was there, or is now"
    if (booked.account_id, booked.nano, booked.kind) != (record.id, nano, kind):
        raise SettingsError(
            f"The reference `{booked.reference}` was used for another booking, {booked}. Give each booking its own, or "
            "none at all."
        )
    return balance


def book(connection: Connection, account: str, nano: int, *, now: int, kind: str, ref: str | None) -> bool:
    """`top_up`; `False` where that changed nothing: `ref` had been booked before, or the amount is nothing."""
    before = None if ref is None else bookings.find_booking(connection, ref)
    top_up(connection, account, nano, now=now, kind=kind, ref=ref)
    return before is None and nano != 0


def disable(connection: Connection, key_id: str, now: int) -> bool:
    """Make a key useless. `False` where it was before."""
    before = accounts.find_key(connection, key_id)
    return accounts.disable_key(connection, key_id, now) and before is not None and before.disabled is None


def change_limits(connection: Connection, key: str, changes: Mapping[str, int | None]) -> KeyRecord:
    """Change some of a key's limits, by the names of `KeyLimits`; return the key as it is then."""
    record = the_key(connection, key)
    if not changes:
        return record
    KeyLimits(**changes)
    accounts.set_limits(connection, record.caller.key_id, changes)
    return the_key(connection, record.caller.key_id)


def the_account(connection: Connection, account: str) -> AccountRecord:
    """An account by id or name. Raises `SettingsError` when there is none."""
    if account.isprintable():  # what is no text at all no database takes
        named = accounts.find_account(connection, account) or next(
            iter(accounts.list_accounts(connection, name=account)), None
        )
        if named is not None:
            return named
    raise SettingsError(f"There is no account `{account[:80]}`. `ernie-serve keys create` makes one.")


def the_key(connection: Connection, key: str) -> KeyRecord:
    """A key by its public id, with or without `sk-`, by the whole of it, or by a name that no other key has.

    Raises `SettingsError` when there is none, or several.
    """
    key_id = public_id_of(key) or key.removeprefix("sk-")
    found = accounts.find_key(connection, key_id) if key_id.isprintable() else None
    named = [found] if found else [each for each in accounts.list_keys(connection) if each.caller.key_name == key]
    if len(named) == 1:
        return named[0]
    shown = "that" if public_id_of(key) else f"`{key[:80]}`"
    if not named:
        raise SettingsError(f"There is no key {shown}. `ernie-serve keys list` shows those there are.")
    ids = ", ".join(each.caller.key_id for each in named[:5])
    raise SettingsError(f"{len(named)} keys have the name {shown}: {ids}. Give one of these ids.")
