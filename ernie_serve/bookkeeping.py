"""What `ernie-serve keys`, `topup`, `bookings`, `prices` and `audit` do: on the store, whether a server runs or not.

Knows the store's office, and how amounts, times and tables are written for a person. Knows no flag.
"""

import datetime
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from ernie_serve.billing import accounts, bookings, office, price_lists, reports
from ernie_serve.billing.accounts import KeyRecord
from ernie_serve.billing.keys import KeyLimits, parse_scopes
from ernie_serve.billing.money import MAX_NANO, format_usd, parse_usd
from ernie_serve.billing.office import Office
from ernie_serve.billing.opening import default_url
from ernie_serve.billing.prices import usd_per_million
from ernie_serve.errors import SettingsError

LIMITS = {
    "rpm": "requests_per_minute",
    "tpm": "tokens_per_minute",
    "max_concurrent": "concurrent",
    "monthly_limit": "month_nano",
}
"""The flags that limit a key, and what they are in the store."""

_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def create_key(
    url: str | None,
    name: str,
    *,
    account: str,
    project: str,
    credit: str,
    scopes: str,
    limits: Mapping[str, str | None],
    expires: str | None,
) -> None:
    """Make a key and print it, as the last line and nowhere else."""
    now = time_now()
    until = None if expires is None else parse_time(expires, "--expires", now, ahead=True)
    if until is not None and until <= now:
        raise SettingsError(f"--expires is {expires}, which is over. Give a time to come, such as 90d or 2030-01-31.")
    credit_nano = parse_usd(credit, "--credit")
    if credit_nano < 0:
        raise SettingsError(f"--credit is {credit}; give 0 or more. `ernie-serve topup` also takes credit away.")
    allowed, limited = parse_scopes(scopes), KeyLimits(**_limits(limits))  # before a store is made
    with opened(url, make=True) as desk:
        new = desk(
            office.open_key,
            name,
            now=now,
            account=account,
            project=project,
            credit_nano=credit_nano,
            scopes=allowed,
            limits=limited,
            expires=until,
        )
        record = desk.read(office.the_key, new.key_id)
    print(f"Key {_shown(record)} of account {record.account_name}, project {record.project_name}.")
    print(f"Scopes: {_scopes(record)}. Limits: {_told(record.caller.limits)}. Expires: {date_of(until) or 'never'}.")
    print(f"The account has {format_usd(new.balance_nano)} USD; `ernie-serve topup {new.account_id} USD` adds to it.")
    print("The key is shown this once:")
    print(new.key)


def list_keys(url: str | None) -> None:
    """Print every key, how it stands and what its account has."""
    with opened(url) as desk:
        records = desk.read(accounts.list_keys)
        balances = {each.id: each.balance_nano for each in desk.read(accounts.list_accounts)}
    names = ("key", "name", "account", "balance USD", "project", "state", "scopes", "limits")
    rows = [
        (
            f"sk-{record.caller.key_id}",
            record.caller.key_name,
            record.account_name,
            format_usd(balances[record.caller.account_id]),
            record.project_name,
            record.state(time_now()),
            _scopes(record),
            _told(record.caller.limits),
            date_of(record.created),
            date_of(record.last_used),
            date_of(record.caller.expires) or "never",
        )
        for record in records
    ]
    print_table((*names, "created", "last used", "expires"), rows, numbers={"balance USD"})


def disable_key(url: str | None, key: str) -> None:
    """Make a key useless, in every server within five seconds."""
    with opened(url) as desk:
        record = desk.read(office.the_key, key)
        desk(accounts.disable_key, record.caller.key_id, time_now())
    print(f"Key {_shown(record)} is disabled. Running servers refuse it within 5 seconds.")


def limit_key(url: str | None, key: str, limits: Mapping[str, str | None]) -> None:
    """Change those limits of a key that are given; `none` lifts one."""
    changes = _limits(limits)
    if not changes:
        raise SettingsError("Nothing is to be changed. Give --rpm, --tpm, --max-concurrent or --monthly-limit.")
    with opened(url) as desk:
        record = desk(office.change_limits, key, changes)
    print(f"Key {_shown(record)} now has these limits: {_told(record.caller.limits)}.")


def top_up(url: str | None, account: str, amount: str, *, kind: str | None, reference: str | None) -> None:
    """Add to an account, or take from it."""
    nano = parse_usd(amount, "USD")
    kind = kind or ("topup" if nano >= 0 else "adjust")
    with opened(url) as desk:
        ref = None if reference is None else bookings.given_ref(reference)
        new = desk(office.book, account, nano, now=time_now(), kind=kind, ref=ref)
        before = None if new or ref is None else desk.read(bookings.find_booking, ref)
        record = desk.read(office.the_account, account)
    if before is not None:
        print(f"The reference `{before.reference}` was booked before, {before}: nothing is booked again.")
    print(f"The account {record.name} ({record.id}) has {format_usd(record.balance_nano)} USD.")


def list_bookings(url: str | None, account: str | None) -> None:
    """Print what was booked by hand, to every account or to one."""
    with opened(url) as desk:
        account_id = None if account is None else desk.read(office.the_account, account).id
        records = desk.read(bookings.list_bookings, account_id)
    rows = [
        (date_of(each.created), each.account_name, each.kind, format_usd(each.nano), each.reference or "")
        for each in records
    ]
    print_table(("booked", "account", "kind", "USD", "reference"), rows, numbers={"USD"})


def list_prices(url: str | None) -> None:
    """Print every price list, and since when it held."""
    with opened(url) as desk:
        found = desk.read(price_lists.list_prices)
    names = ("version", "model", "input", "cached", "output", "since")
    rows = [
        (
            str(each.prices.version),
            each.model,
            usd_per_million(each.prices.input_nano),
            usd_per_million(each.prices.cached_nano),
            usd_per_million(each.prices.output_nano),
            date_of(each.valid_from),
        )
        for each in found
    ]
    print_table(names, rows, numbers={"version", "input", "cached", "output"})


def audit(url: str | None) -> bool:
    """Print that the store adds up, or a line for whatever does not; whether it does."""
    with opened(url) as desk:
        found = desk.read(reports.problems)
    for each in found or ("Every balance, every hold and every day's usage is the sum of its rows.",):
        print(each)
    return not found


def parse_time(text: str, what: str, now: int, *, ahead: bool = False) -> int:
    """Seconds since 1970 from a date, a time or a distance such as `30d`, which lies ahead or back. UTC."""
    distance = re.fullmatch(r"(\d{1,6})([mhdw])", text.strip())
    if distance:
        seconds = int(distance[1]) * _SECONDS[distance[2]]
        return now + seconds if ahead else max(0, now - seconds)
    try:
        moment = datetime.datetime.fromisoformat(text.strip())
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        seconds = int(moment.timestamp())
        if seconds < 0:
            raise ValueError
    except (ValueError, OverflowError):
        raise SettingsError(
            f"{what} is `{text[:40]}`, which is no time. Give a date (2026-11-25), a time (2026-11-25T12:00) or a "
            "distance (90m, 12h, 30d, 4w)."
        ) from None
    return seconds


@contextmanager
def opened(url: str | None, *, make: bool = False) -> Iterator[Office]:
    """The office of the store that a flag, the environment or nobody names, and that is made only with `make`."""
    with office.office(url or default_url(), make=make) as desk:
        yield desk


def time_now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def _limits(given: Mapping[str, str | None]) -> dict[str, int | None]:
    """Limits of the store from flags; those that were not given are missing, `none` is no limit."""
    changes: dict[str, int | None] = {}
    for name, text in given.items():
        if text is None:
            continue
        flag = "--" + name.replace("_", "-")
        if text.strip().lower() == "none":
            changes[LIMITS[name]] = None
        elif name == "monthly_limit":
            changes[LIMITS[name]] = parse_usd(text, flag)
        elif re.fullmatch(r"[0-9]{1,19}", text.strip()) and int(text) <= MAX_NANO:
            changes[LIMITS[name]] = int(text)
        else:
            raise SettingsError(f"{flag} is `{text[:40]}`; give a whole number up to {MAX_NANO}, or none for no limit.")
    KeyLimits(**changes)
    return changes


def print_table(names: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Set[str]) -> None:
    """Print rows in columns, each in a line of its own; a pipe is given lines of any length."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    wide = None if sys.stdout.isatty() else 10_000
    Console(markup=False, highlight=False, emoji=False, width=wide).print(table)


def date_of(seconds: int | None) -> str:
    """A time as a person reads it, in UTC; nothing for none."""
    if seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M")


def _shown(record: KeyRecord) -> str:
    return f"{record.caller.key_name} (sk-{record.caller.key_id})"


def _scopes(record: KeyRecord) -> str:
    return ", ".join(sorted(record.caller.scopes))


def _told(limits: KeyLimits) -> str:
    month = limits.month_nano
    told = (
        (limits.requests_per_minute, f"{limits.requests_per_minute} requests a minute"),
        (limits.tokens_per_minute, f"{limits.tokens_per_minute} tokens a minute"),
        (limits.concurrent, f"{limits.concurrent} at once"),
        (month, f"{format_usd(month or 0)} USD a month"),
    )
    return ", ".join(text for limit, text in told if limit is not None) or "none"
