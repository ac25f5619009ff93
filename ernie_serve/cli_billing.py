"""The verbs of billing: keys, topup, bookings, usage, prices, audit.

Knows their flags. Knows nothing of what they do.
"""

from typing import Annotated, Any

import typer

from ernie_serve.errors import SettingsError

keys_app = typer.Typer(help="Make, list, disable and limit API keys.", no_args_is_help=True)


def _flag(name: str, description: str, **more: Any) -> Any:
    return typer.Option(name, help=description.replace("[", r"\["), show_default=False, **more)


Store = Annotated[
    str | None,
    _flag("--database-url", "Billing store. Default: ERNIE_SERVE_DATABASE_URL, or a file of the user's data."),
]
Rpm = Annotated[str | None, _flag("--rpm", "Requests a minute.", metavar="N")]
Tpm = Annotated[str | None, _flag("--tpm", "Tokens a minute, prompt and answer together.", metavar="N")]
Concurrent = Annotated[str | None, _flag("--max-concurrent", "Requests at once.", metavar="N")]
Monthly = Annotated[str | None, _flag("--monthly-limit", "US dollars in a calendar month, UTC.", metavar="USD")]
Key = Annotated[str, typer.Argument(help="The key's id (sk-…, as `keys list` shows it) or its name.")]


@keys_app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What to call the key.")],
    account: Annotated[str, _flag("--account", "Who pays; made if new. [default: default]")] = "default",
    project: Annotated[str, _flag("--project", "A part of the account; made if new. [default: default]")] = "default",
    credit: Annotated[str, _flag("--credit", "Add this to the account's balance.", metavar="USD")] = "0",
    rpm: Rpm = None,
    tpm: Tpm = None,
    max_concurrent: Concurrent = None,
    monthly_limit: Monthly = None,
    scopes: Annotated[
        str, _flag("--scopes", "Of inference, read-usage, metrics, admin. [default: inference,read-usage]")
    ] = "inference,read-usage",
    expires: Annotated[
        str | None, _flag("--expires", "When it stops working: 2030-01-31, or 90d from now.", metavar="TIME")
    ] = None,
    database_url: Store = None,
) -> None:
    """Make a key, and its account where that is new; the key is the last line, and is shown this once."""
    from ernie_serve import bookkeeping

    bookkeeping.create_key(
        database_url,
        name,
        account=account,
        project=project,
        credit=credit,
        scopes=scopes,
        limits={"rpm": rpm, "tpm": tpm, "max_concurrent": max_concurrent, "monthly_limit": monthly_limit},
        expires=expires,
    )


@keys_app.command("list")
def list_all(database_url: Store = None) -> None:
    """Show every key, its account's balance and its limits; never the key itself."""
    from ernie_serve import bookkeeping

    bookkeeping.list_keys(database_url)


@keys_app.command("disable")
def disable(key: Key, database_url: Store = None) -> None:
    """Make a key useless for ever; running servers refuse it within 5 seconds."""
    from ernie_serve import bookkeeping

    bookkeeping.disable_key(database_url, key)


@keys_app.command("limit")
def limit(
    key: Key,
    rpm: Rpm = None,
    tpm: Tpm = None,
    max_concurrent: Concurrent = None,
    monthly_limit: Monthly = None,
    database_url: Store = None,
) -> None:
    """Change the limits that are given; `none` lifts one. Running servers follow within 5 seconds."""
    from ernie_serve import bookkeeping

    limits = {"rpm": rpm, "tpm": tpm, "max_concurrent": max_concurrent, "monthly_limit": monthly_limit}
    bookkeeping.limit_key(database_url, key, limits)


def topup(
    account: Annotated[str, typer.Argument(help="The account's name or id.")],
    usd: Annotated[str, typer.Argument(metavar="USD", help="US dollars, to nine places; less than 0 takes away.")],
    kind: Annotated[
        str | None, _flag("--kind", "topup, refund or adjust. [default: topup, and adjust for what is taken away]")
    ] = None,
    reference: Annotated[
        str | None, _flag("--reference", "Such as an invoice's number: it is booked once, however often this runs.")
    ] = None,
    database_url: Store = None,
) -> None:
    """Add credit to an account and print its balance."""
    from ernie_serve import bookkeeping

    bookkeeping.top_up(database_url, account, usd, kind=kind, reference=reference)


def bookings(
    account: Annotated[str | None, _flag("--account", "Those to this account alone, by name or id.")] = None,
    database_url: Store = None,
) -> None:
    """Show what was booked to accounts by hand, oldest first: credit of new keys, top-ups, refunds, adjustments."""
    from ernie_serve import bookkeeping

    bookkeeping.list_bookings(database_url, account)


def usage(
    since: Annotated[str, _flag("--since", "From when: 2026-11-01, or 30d ago. [default: 30d]")] = "30d",
    until: Annotated[
        str | None, _flag("--until", "To when, which is excluded: 2026-12-01 ends with November. [default: now]")
    ] = None,
    by: Annotated[
        str, _flag("--by", "A row for each day or hour, and account, project, key, model. [default: day,account]")
    ] = "day,account",
    account: Annotated[str | None, _flag("--account", "Of this account alone, by name or id.")] = None,
    project: Annotated[str | None, _flag("--project", "Of this project alone, by name or id.")] = None,
    key: Annotated[str | None, _flag("--key", "Of this key alone, by name or id.")] = None,
    model: Annotated[str | None, _flag("--model", "Of this model alone.")] = None,
    csv: Annotated[bool, _flag("--csv", "Write every request as a line of CSV instead.")] = False,
    json: Annotated[bool, _flag("--json", "Write every request as a line of JSON instead.")] = False,
    database_url: Store = None,
) -> None:
    """Show requests, tokens and cost, of 30 days unless told. Times are UTC; the table counts whole days or hours."""
    from ernie_serve import usage_table

    if csv and json:
        raise SettingsError("--csv and --json exclude each other.")
    whose = {"account": account, "project": project, "key": key, "model": model}
    if csv or json:
        usage_table.export_usage(database_url, "csv" if csv else "jsonl", since=since, until=until, **whose)
    else:
        usage_table.show_usage(database_url, since=since, until=until, by=by, **whose)


def prices(database_url: Store = None) -> None:
    """Show what a million tokens cost in US dollars, by the `price_version` of exports, and from when on (UTC)."""
    from ernie_serve import bookkeeping

    bookkeeping.list_prices(database_url)


def audit(database_url: Store = None) -> None:
    """Count the whole ledger again and say that it adds up, or what does not, with exit code 1."""
    from ernie_serve import bookkeeping

    if not bookkeeping.audit(database_url):
        raise typer.Exit(1)
