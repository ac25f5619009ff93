"""What was used and what it cost, read back: one request, lists, sums by time, and exports.

Knows the tables. Knows no HTTP: shapes that clients see are made from these by whoever serves them. Times are seconds,
ends are exclusive.
"""

import csv
import datetime
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from sqlalchemy import BigInteger, ColumnElement, Connection, Table, and_, cast, func, or_, select

from ernie_serve.billing.keys import Caller
from ernie_serve.billing.ledger import DAY, month_end, month_start
from ernie_serve.billing.money import format_usd
from ernie_serve.billing.schema import account, ledger, reservation, usage_day, usage_event
from ernie_serve.errors import InvalidRequest

Width = Literal["1m", "1h", "1d"]
Group = Literal["project_id", "key_id", "model", "account_id"]
ExportFormat = Literal["csv", "jsonl"]

Read = Callable[..., "list[UsageRow]"]
"""Runs a reading function in a transaction of its own."""

_SECONDS: dict[Width, int] = {"1m": 60, "1h": 3600, "1d": DAY}
_MAX_BUCKETS: dict[Width, int] = {"1m": 1440, "1h": 168, "1d": 366}
_SUMS = ("prompt", "cached", "completion", "reasoning", "cost_nano")
EXPORT_PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Whose usage: of an account, or of some projects, keys or models. `None` throughout is everybody's."""

    account_id: str | None = None
    project_id: str | tuple[str, ...] | None = None
    key_id: str | tuple[str, ...] | None = None
    model: str | tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """One request as it was charged."""

    request_id: str
    account_id: str
    project_id: str
    key_id: str
    model: str
    price_version: int
    prompt: int
    cached: int
    completion: int
    reasoning: int
    cost_nano: int
    status: str
    finish_reason: str | None
    ttft_us: int | None
    total_us: int | None
    created: int


_NAMES = [field.name for field in fields(UsageRow)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Requests, tokens and money of one group. A field that was not grouped by is `None`."""

    account_id: str | None = None
    project_id: str | None = None
    key_id: str | None = None
    model: str | None = None
    requests: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    cost_nano: int = 0


@dataclass(frozen=True, slots=True)
class Bucket:
    """A span of time and what was used in it; nothing at all is an empty tuple."""

    start: int
    end: int
    results: tuple[Sums, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Buckets in order of time. `next_page` is the start of the first bucket that is missing, if one is."""

    buckets: tuple[Bucket, ...]
    next_page: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """What a key has spent today, this week (from Monday), this month and ever, and its project this month, in UTC."""

    day_nano: int
    week_nano: int
    month_nano: int
    total_nano: int
    project_month_nano: int


def find_usage(connection: Connection, request_id: str, scope: Scope) -> UsageRow | None:
    """One request's row, if it is within `scope`."""
    query = select(usage_event).where(usage_event.c.request_id == request_id, *_within(usage_event, scope))
    row = connection.execute(query).mappings().first()
    return None if row is None else UsageRow(**row)


def list_usage(
    connection: Connection, scope: Scope, *, start: int, end: int, after: tuple[int, str] = (0, ""), limit: int = 100
) -> list[UsageRow]:
    """Rows in order of time. `after` is the `(created, request_id)` of the last row already seen."""
    created, request_id = usage_event.c.created, usage_event.c.request_id
    later = or_(created > after[0], (created == after[0]) & (request_id > after[1]))
    query = select(usage_event).where(
        *_within(usage_event, scope), created >= max(start, after[0]), created < end, later
    )
    rows = connection.execute(query.order_by(created, request_id).limit(limit)).mappings()
    return [UsageRow(**row) for row in rows]


def usage_by_time(
    connection: Connection,
    scope: Scope,
    *,
    start: int,
    end: int,
    width: Width = "1d",
    group_by: Sequence[Group] = (),
    limit: int | None = None,
    page: int | None = None,
) -> Page:
    """Sums for each bucket of `width` between `start` and `end`, `limit` buckets from `page` on.

    Days are whole; in the other widths nothing counts that came before `start`, not even in its bucket.
    Raises `InvalidRequest` for a group that is named twice, and for more buckets than are offered of a width.
    """
    _check(width, group_by, limit)
    seconds = _SECONDS[width]
    first = max(start - start % seconds, (page or 0) - (page or 0) % seconds)
    count = min(limit or (7 if width == "1d" else 24 if width == "1h" else 60), -(-(end - first) // seconds))
    last = first + max(0, count) * seconds
    since = first if width == "1d" else max(start, first)
    table, time = (usage_day, usage_day.c.day) if width == "1d" else (usage_event, usage_event.c.created)
    groups = [table.c[name] for name in group_by]
    bucket = (time - time % seconds).label("bucket")
    requests = func.sum(table.c.requests) if table is usage_day else func.count()
    sums = [cast(func.sum(table.c[name]), BigInteger).label(name) for name in _SUMS]
    query = (
        select(bucket, *groups, cast(requests, BigInteger).label("requests"), *sums)
        .where(*_within(table, scope), time >= since, time < min(last, end))
        .group_by(bucket, *groups)
        .order_by(bucket, *groups)
    )
    found: dict[int, list[Sums]] = {}
    for row in connection.execute(query).mappings():
        values = dict(row)
        found.setdefault(values.pop("bucket"), []).append(Sums(**values))
    starts = range(first, last, seconds)
    buckets = tuple(Bucket(at, at + seconds, tuple(found.get(at, ()))) for at in starts)
    return Page(buckets, last if last < end else None)


def add(several: Sequence[Sums]) -> Sums:
    """Sums of the same group as one."""
    total = {name: sum(getattr(each, name) for each in several) for name in ("requests", *_SUMS)}
    return replace(several[0] if several else Sums(), **total)


def spending(connection: Connection, caller: Caller, now: int) -> Spending:
    """What a key has spent, by span, and its project."""
    day = now - now % DAY
    week = day - (day // DAY + 3) % 7 * DAY  # the first of January 1970 was a Thursday
    day_of, cost = usage_day.c.day, usage_day.c.cost_nano
    own = usage_day.c.key_id == caller.key_id
    in_month = and_(day_of >= month_start(now), day_of < month_end(now))
    sums = {
        "day_nano": and_(own, day_of == day),
        "week_nano": and_(own, day_of >= week, day_of < week + 7 * DAY),
        "month_nano": and_(own, in_month),
        "total_nano": own,
        "project_month_nano": in_month,
    }
    spans = [
        cast(func.coalesce(func.sum(cost).filter(counted), 0), BigInteger).label(name) for name, counted in sums.items()
    ]
    query = select(*spans).where(
        usage_day.c.account_id == caller.account_id, usage_day.c.project_id == caller.project_id
    )
    return Spending(**connection.execute(query).mappings().one())


def export_head(form: ExportFormat) -> bytes:
    """What comes before the rows: a line of names in CSV, nothing in JSON lines."""
    return _csv_line([*_NAMES, "cost_usd"]) if form == "csv" else b""


def export_rows(rows: Sequence[UsageRow], form: ExportFormat) -> bytes:
    """Rows as CSV or JSON lines, with money in both spellings."""
    values = [asdict(row) | {"cost_usd": format_usd(row.cost_nano)} for row in rows]
    if form == "csv":
        return b"".join(_csv_line(list(each.values())) for each in values)
    return b"".join(json.dumps(each, separators=(",", ":")).encode() + b"\n" for each in values)


def export(read: Read, scope: Scope, form: ExportFormat, *, start: int, end: int) -> Iterator[bytes]:
    """Every row between two times. Each page is read by itself, so that a slow reader holds nothing."""
    yield export_head(form)
    after = (0, "")
    while rows := read(list_usage, scope, start=start, end=end, after=after, limit=EXPORT_PAGE):
        yield export_rows(rows, form)
        after = (rows[-1].created, rows[-1].request_id)


def problems(connection: Connection) -> list[str]:
    """What does not add up, in words; an empty list is a healthy ledger."""
    booked = _sums(connection, ledger, ledger.c.delta_nano)
    charged = _sums(connection, ledger, ledger.c.delta_nano, ledger.c.kind == "usage")
    held = _sums(connection, reservation, reservation.c.amount_nano)
    used = _sums(connection, usage_event, usage_event.c.cost_nano)
    found = []
    for row in connection.execute(select(account.c.id, account.c.balance_nano, account.c.reserved_nano)):
        for name, kept, counted in (
            ("balance", row.balance_nano, booked.get(row.id, 0)),
            ("reserved", row.reserved_nano, held.get(row.id, 0)),
            ("usage", -charged.get(row.id, 0), used.get(row.id, 0)),
        ):
            if kept != counted:
                found.append(f"account {row.id}: {name} is {kept}, counted {counted} nano-USD")
        if not 0 <= row.reserved_nano <= row.balance_nano:
            found.append(f"account {row.id}: reserved {row.reserved_nano} of {row.balance_nano} nano-USD")
    return found + _day_problems(connection)


def _day_problems(connection: Connection) -> list[str]:
    """Roll-ups that are not the sum of their rows."""
    whose, counts = ("account_id", "project_id", "key_id", "model"), ("requests", *_SUMS)
    day = (usage_event.c.created - usage_event.c.created % DAY).label("day")
    groups = [usage_event.c[name] for name in whose]
    sums = [cast(func.sum(usage_event.c[name]), BigInteger).label(name) for name in _SUMS]
    recount = select(day, *groups, func.count().label("requests"), *sums).group_by(day, *groups)
    roll_ups = select(*(usage_day.c[name] for name in ("day", *whose, *counts)))
    kept, counted = ({tuple(row[:5]): row[5:] for row in connection.execute(query)} for query in (roll_ups, recount))
    found, nothing = [], (0,) * len(counts)
    for each in sorted(kept.keys() | counted.keys()):
        date = datetime.datetime.fromtimestamp(each[0], datetime.UTC).date()
        about = ", ".join(f"{name.removesuffix('_id')} {value}" for name, value in zip(whose, each[1:], strict=True))
        for name, one, other in zip(counts, kept.get(each, nothing), counted.get(each, nothing), strict=True):
            if one != other:
                found.append(f"day {date}, {about}: {name} is {one}, counted {other}")
    return found


def _sums(
    connection: Connection, table: Table, column: ColumnElement[int], *conditions: ColumnElement[bool]
) -> dict[str, int]:
    """The sum of a column for each account."""
    total = select(table.c.account_id, cast(func.sum(column), BigInteger)).where(*conditions)
    return {row[0]: row[1] for row in connection.execute(total.group_by(table.c.account_id))}


def _within(table: Table, scope: Scope) -> list[ColumnElement[bool]]:
    wanted = {name: value for name, value in asdict(scope).items() if value is not None}
    return [table.c[name].in_((value,) if isinstance(value, str) else value) for name, value in wanted.items()]


def _check(width: Width, group_by: Sequence[Group], limit: int | None) -> None:
    if len(set(group_by)) < len(group_by):
        told = f"`group_by` may name each of {', '.join(get_args(Group))} once; it has {str(list(group_by))[:80]}."
        raise InvalidRequest(told, param="group_by")
    if limit is not None and limit > _MAX_BUCKETS[width]:
        raise InvalidRequest(
            f"`limit` is {limit}; with buckets of {width} ask for 1 to {_MAX_BUCKETS[width]}.", param="limit"
        )


def _csv_line(values: list[Any]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(["" if value is None else value for value in values])
    return line.getvalue().encode()
