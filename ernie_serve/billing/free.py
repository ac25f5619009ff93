"""The meter of one person on one machine: keys if some are set, and nothing costs anything.

Knows the keys of the settings. Knows no store.
"""

import hmac
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection

from ernie_serve.billing.keys import SCOPES, Caller, digest
from ernie_serve.billing.meter import Charge, Charging, Counters, Order, Reservation
from ernie_serve.billing.money import Nano
from ernie_serve.billing.prices import Prices, Status, Usage
from ernie_serve.errors import Unauthorized, UnknownUrl

P = ParamSpec("P")
T = TypeVar("T")

_FREE = Prices(input_nano=0, cached_nano=0, output_nano=0)


class FreeMeter:
    """Lets everybody in, or those with one of `keys`; holds nothing and charges nothing."""

    charges = False

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self.counters = Counters()
        self._digests = [digest(key) for key in keys]

    async def authenticate(self, key: str | None) -> Caller:
        """Whoever has one of the keys, or anybody where there are none."""
        account_id = ""
        if self._digests:
            account_id = given = digest(key or "")
            # Every key is compared, so that the time does not tell which one came close.
            if not any([hmac.compare_digest(given, each) for each in self._digests]) or not key:  # noqa: C419
                raise Unauthorized(
                    "Incorrect API key provided, or none. Send one of this server's as `Authorization: Bearer …`."
                )
        return Caller(account_id=account_id, project_id="local", key_id="local", scopes=frozenset(SCOPES))

    async def reserve(self, caller: Caller, order: Order) -> Reservation:
        """Everything that is asked for."""
        self.counters.reserved += 1
        return Reservation(caller, order, _FREE, order.n * order.tokens_each)

    def settle(
        self,
        reservation: Reservation,
        usage: Usage,
        status: Status,
        *,
        finish_reason: str | None = None,
        ttft_us: int | None = None,
        total_us: int | None = None,
    ) -> Charging:
        """Charge nothing; see `Meter.settle`."""
        if reservation.charge is None:
            self.counters.settled += 1
            reservation.charge = Charging()
            reservation.charge.end(Charge(Nano(0), usage, 0))
        return reservation.charge

    async def report(self, read: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """There is nothing to tell."""
        raise UnknownUrl(OFF)

    async def change(self, do: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """There is nothing to change."""
        raise UnknownUrl(OFF)

    def rate_headers(self, caller: Caller) -> dict[str, str]:
        """No limits, no headers."""
        return {}

    async def close(self) -> None:
        """Nothing is open."""


OFF = "This server does not meter its use. Start it with --billing to have keys, prices and reports."
