"""What persons booked to accounts, read back: top-ups, refunds and adjustments, never what requests cost.

Knows the ledger's table, and how a person's reference is written there.
"""

import datetime
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, select

from ernie_serve.billing.money import format_usd
from ernie_serve.billing.schema import BY_HAND, account, ledger
from ernie_serve.errors import SettingsError

_GIVEN = "ref:"
"""Begins the `ref` of what a person gave a reference; the others are made here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Booking:
    """A change of a balance by hand. Credit that came with a key is a `topup`."""

    id: int
    account_id: str
    account_name: str
    kind: str
    nano: int
    ref: str
    created: int

    @property
    def reference(self) -> str | None:
        """What a person called it, if one did."""
        return self.ref.removeprefix(_GIVEN) if self.ref.startswith(_GIVEN) else None

    def __str__(self) -> str:
        """As a person reads it."""
        at = datetime.datetime.fromtimestamp(self.created, datetime.UTC)
        usd, whose = format_usd(self.nano), f"{self.account_name} ({self.account_id})"
        return f"{usd} USD as {self.kind} to the account {whose} on {at:%Y-%m-%d %H:%M} UTC"


def given_ref(reference: str) -> str:
    """The `ref` of a booking from what a person calls it, which is never that of a request or a key."""
    if not 0 < len(reference) <= 128 or not reference.isprintable():
        raise SettingsError(f"The reference has {len(reference)} characters; give 1 to 128 printable ones.")
    return f"{_GIVEN}{reference}"


def find_booking(connection: Connection, ref: str) -> Booking | None:
    """What was booked under a `ref`."""
    return next(iter(_bookings(connection, ledger.c.ref == ref)), None)


def list_bookings(
    connection: Connection, account_id: str | None = None, *, after: int = 0, limit: int | None = None
) -> list[Booking]:
    """Bookings, oldest first: every one, or those to an account; `limit` of them after the one with the id `after`."""
    mine = [] if account_id is None else [ledger.c.account_id == account_id]
    return _bookings(connection, ledger.c.id > after, *mine, limit=limit)


def _bookings(connection: Connection, *conditions: ColumnElement[bool], limit: int | None = None) -> list[Booking]:
    columns = (
        ledger.c.id,
        ledger.c.account_id,
        account.c.name.label("account_name"),
        ledger.c.kind,
        ledger.c.delta_nano.label("nano"),
        ledger.c.ref,
        ledger.c.created,
    )
    query = select(*columns).join(account, account.c.id == ledger.c.account_id).where(BY_HAND, *conditions)
    return [Booking(**row) for row in connection.execute(query.order_by(ledger.c.id).limit(limit)).mappings()]
