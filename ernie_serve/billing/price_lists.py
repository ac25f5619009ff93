"""Price lists as SQL: what a token cost from when on.

Knows the table. Lists are only ever added, so that what was charged can always be explained.
"""

from dataclasses import dataclass
from itertools import groupby

from sqlalchemy import Connection, func, insert, select, text

from ernie_serve.billing.prices import Prices
from ernie_serve.billing.schema import price

_KINDS = ("input", "cached", "output")


@dataclass(frozen=True, slots=True)
class PriceList:
    """Prices of a model, and since when: they hold until its next list."""

    model: str
    prices: Prices
    valid_from: int


def list_prices(connection: Connection, *, after: int = 0, limit: int | None = None) -> list[PriceList]:
    """Price lists of every model, oldest first; `limit` of them after the version `after`."""
    query = select(price).where(price.c.version > after).order_by(price.c.version)
    rows = connection.execute(query.limit(None if limit is None else limit * len(_KINDS)))
    found = []
    for version, kinds in groupby(rows, key=lambda row: row.version):
        row = {each.kind: each for each in kinds}
        nano = {f"{kind}_nano": row[kind].nano_per_token for kind in _KINDS}
        found.append(PriceList(row["input"].model, Prices(**nano, version=version), row["input"].valid_from))
    return found


def current_prices(connection: Connection, model: str) -> Prices | None:
    """The newest price list of a model."""
    newest = select(func.max(price.c.version)).where(price.c.model == model).scalar_subquery()
    rows = connection.execute(
        select(price.c.version, price.c.kind, price.c.nano_per_token).where(price.c.version == newest)
    )
    kinds = {row.kind: row for row in rows}
    if not kinds:
        return None
    return Prices(
        input_nano=kinds["input"].nano_per_token,
        cached_nano=kinds["cached"].nano_per_token,
        output_nano=kinds["output"].nano_per_token,
        version=kinds["input"].version,
    )


def set_prices(connection: Connection, model: str, prices: Prices, now: int) -> Prices:
    """Make these the prices of a model from now on; a new version unless nothing changes."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("LOCK TABLE price IN SHARE ROW EXCLUSIVE MODE"))  # replicas start at the same time
    current = current_prices(connection, model)
    new = (prices.input_nano, prices.cached_nano, prices.output_nano)
    if current is not None and new == (current.input_nano, current.cached_nano, current.output_nano):
        return current
    version = 1 + (connection.execute(select(func.max(price.c.version))).scalar() or 0)
    shared = {"version": version, "model": model, "valid_from": now}
    kinds = zip(_KINDS, new, strict=True)
    connection.execute(insert(price), [shared | {"kind": kind, "nano_per_token": nano} for kind, nano in kinds])
    return Prices(input_nano=new[0], cached_nano=new[1], output_nano=new[2], version=version)
