"""The verbs of billing, by themselves and beside a running server, on both stores."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Run
from sqlalchemy import Connection
from stores import Shop

from ernie_serve.billing.accounts import list_keys
from ernie_serve.billing.meter import Order
from ernie_serve.billing.office import office, open_key
from ernie_serve.billing.prices import Prices, Usage
from ernie_serve.bookkeeping import parse_time
from ernie_serve.errors import PaymentRequired, RateLimited, SettingsError, Unauthorized

NOW = 1_800_000_000


@pytest.fixture
def run_on(monkeypatch: pytest.MonkeyPatch, run_command: Run) -> Callable[[str], Run]:
    """A function that runs commands on a store, and gives the exit code and what went to both outputs."""

    def on(url: str) -> Run:
        def main(*arguments: str) -> tuple[int, str, str]:
            monkeypatch.setenv("ERNIE_SERVE_DATABASE_URL", url)
            return run_command(*arguments)

        return main

    return on


@pytest.fixture
def run(run_on: Callable[[str], Run], url: str) -> Run:
    """Run a command on a store of either kind."""
    return run_on(url)


@pytest.fixture
def run_small(run_on: Callable[[str], Run], sqlite_url: str) -> Run:
    """Run a command on a SQLite store."""
    return run_on(sqlite_url)


def last_line(out: str) -> str:
    return out.splitlines()[-1]


def test_a_key_is_printed_as_the_last_line_and_nowhere_else(run: Run) -> None:
    code, out, err = run(
        *("keys", "create", "laptop", "--account", "acme", "--project", "web", "--credit", "2.5", "--rpm", "60"),
        *("--tpm", "none", "--max-concurrent", "4", "--monthly-limit", "0.75", "--scopes", "inference"),
        *("--expires", "2100-01-01"),
    )
    key = last_line(out)
    assert (code, err, out.count(key)) == (0, "", 1)
    assert key.startswith("sk-")
    assert "60 requests a minute, 4 at once, 0.75 USD a month. Expires: 2100-01-01 00:00" in out
    _, shown, _ = run("keys", "list")
    assert key[:19] in shown
    assert key[20:] not in shown
    for fact in ("laptop", "acme", "2.5", "web", "active", "0.75 USD a month"):
        assert fact in last_line(shown)
    assert shown.splitlines()[0].split()[-1] == "expires"
    assert last_line(shown).split()[-2:] == ["2100-01-01", "00:00"]
    run("keys", "create", "for ever")
    ends = {line.split()[-1] for line in run("keys", "list")[1].splitlines()}
    assert ends == {"expires", "00:00", "never"}


def test_credit_is_added_once_for_a_reference_and_taken_away(run: Run) -> None:
    run("keys", "create", "k", "--account", "acme", "--credit", "1")
    for times in range(2):
        told = run("topup", "acme", "5.000000001", "--reference", "invoice 7")[1]
        assert "has 6.000000001 USD" in told
        assert told.count("reference `invoice 7` was booked before, 5.000000001 USD as topup to the account") == times
    assert "has 4.000000001 USD" in run("topup", "acme", "-2")[1]
    assert "has 4.500000001 USD" in run("topup", "acme", "0.5", "--kind", "refund")[1]
    assert "was used for another booking, 5.000000001 USD" in run("topup", "acme", "5", "--reference", "invoice 7")[2]


def test_bookings_are_a_table(run: Run) -> None:
    for name in ("acme", "other"):
        run("keys", "create", "k", "--account", name, "--credit", "1")
    run("topup", "acme", "5", "--reference", "invoice 7")
    run("topup", "other", "-0.5")
    head, *lines = (re.split(" {2,}", line.strip()) for line in run("bookings")[1].splitlines())
    assert head == ["booked", "account", "kind", "USD", "reference"]
    assert [each[1:] for each in lines] == [
        ["acme", "topup", "1"],
        ["other", "topup", "1"],
        ["acme", "topup", "5", "invoice 7"],
        ["other", "adjust", "-0.5"],
    ]
    assert len(run("bookings", "--account", "other")[1].splitlines()) == 1 + 2
    assert "no account `nobody`" in run("bookings", "--account", "nobody")[2]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("topup", "acme", "-9"), "has 1 USD, of which running requests hold 0; 9 cannot be taken"),
        (("topup", "nobody", "9"), "no account `nobody`"),
        (("topup", "acme", "five"), "not a decimal number of US dollars"),
        (("topup", "acme", "0.0000000001"), "9 places or fewer"),
        (("topup", "acme", "1", "--kind", "usage"), "choose topup, refund, adjust"),
        (("topup", "acme", "-0.5", "--kind", "topup"), "choose the kind adjust"),
        (("keys", "create", "k", "--expires", "999999w"), "after the year 9999"),
        (("topup", "acme", "1", "--reference", ""), "1 to 128 printable"),
        (("topup", "acme", "9223372036"), "more than the ledger can hold"),
        (("topup", "acme", "99999999999999999999"), "more than the ledger can hold (9223372036.854775807)"),
        (("topup", "acme", "-99999999999999999999.5"), "more than the ledger can hold (9223372036.854775807)"),
        (("keys", "create", "k", "--credit", "9" * 50), "more than the ledger can hold"),
        (("keys", "create", "k", "--monthly-limit", "9" * 20), "--monthly-limit is `99999999999999999999`, more than"),
        (("keys", "create", "k", "--rpm", "99999999999999999999"), "a whole number up to 9223372036854775807, or none"),
        (("keys", "limit", "k", "--tpm", "9223372036854775808"), "a whole number up to 9223372036854775807, or none"),
        (("keys", "create", ""), "1 to 128 printable"),
        (("keys", "create", "k", "--credit", "-1"), "give 0 or more"),
        (("keys", "create", "k", "--rpm", "fast"), "--rpm is `fast`"),
        (("keys", "create", "k", "--rpm", "0"), "requests_per_minute is 0"),
        (("keys", "create", "k", "--scopes", "root"), "there are inference, read-usage, metrics, admin"),
        (("keys", "create", "k", "--expires", "1999-01-01"), "is over"),
        (("keys", "create", "k", "--expires", "soon"), "is no time"),
        (("keys", "limit", "k"), "Nothing is to be changed"),
        (("keys", "limit", "[/]", "--rpm", "5"), "no key `[/]`"),
        (("keys", "disable", "nobody"), "no key `nobody`"),
        (("usage", "--by", "week"), "name day or hour"),
        (("usage", "--by", "day,hour"), "name day or hour"),
        (("usage", "--since", "2030-01-01"), "is not before now"),
        (("usage", "--project", "none"), "no project `none`"),
        (("usage", "--csv", "--json"), "exclude each other"),
        (("keys", "list", "--database-url", "mysql://u:secret@h/x"), "neither SQLite nor PostgreSQL"),
        (("keys", "list", "--database-url", "postgresql://u:secret@127.0.0.1:1/x"), "cannot be used"),
        (("keys", "list", "--database-url", "sqlite:////proc/none/x.db"), "no billing store at /proc/none/x.db"),
        (("keys", "create", "k", "--database-url", "sqlite:////proc/none/x.db"), "cannot be made"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_what_is_wrong_is_told_in_a_line(run_small: Run, arguments: tuple[str, ...], told: str) -> None:
    run_small("keys", "create", "k", "--account", "acme", "--credit", "1")
    code, out, err = run_small(*arguments)
    assert (code, out) == (1, "")
    assert told in err
    assert len(err.splitlines()) == 1
    assert "secret" not in err


@pytest.mark.parametrize("file", [False, True], ids=["nothing there", "an empty file"])
def test_only_keys_create_makes_a_store(run_on: Callable[[str], Run], tmp_path: Path, file: bool) -> None:
    path = tmp_path / ("billing.db" if file else "folder/billing.db")
    if file:
        path.touch()
    run = run_on(f"sqlite:///{path}")
    for command in (
        "keys list",
        "keys disable k",
        "keys limit k --rpm 5",
        "topup acme 5",
        "usage",
        "bookings",
        "prices",
        "usage --csv",
    ):
        code, out, err = run(*command.split())
        assert (code, out) == (1, "")
        assert err.startswith(f"ernie-serve: There is no billing store at {path}. `ernie-serve keys create` makes one;")
        assert list(tmp_path.iterdir()) == ([path] if file else [])
    assert not file or path.stat().st_size == 0
    run("keys", "create", "k", "--account", "acme")
    assert "acme" in run("keys", "list")[1]


def spend(shop: Shop, keys: dict[str, str], each: int) -> None:
    async def scenario() -> None:
        async with shop.open() as meter:
            for name, key in keys.items():
                caller = await meter.authenticate(key)
                for index in range(each):
                    order = Order(request_id=f"{name}-{index}", model="ernie", prompt_tokens=10, most_tokens=9)
                    usage = Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=4, reasoning_tokens=2)
                    await meter.settle(await meter.reserve(caller, order), usage, "ok")
                shop.clock.move(86_400)

    asyncio.run(scenario())


def test_usage_is_a_table_or_every_request(run: Run, shop: Shop) -> None:
    keys = {
        name: last_line(run("keys", "create", name, "--account", f"of {name}", "--credit", "1")[1])
        for name in ("a", "b")
    }
    spend(shop, keys, 3)
    span = ("--since", "2027-01-15", "--until", "2027-01-18")

    def rows(*arguments: str) -> list[list[str]]:
        return [line.split("  ") for line in run("usage", *span, *arguments)[1].splitlines()]

    def words(line: list[str]) -> list[str]:
        return [word.strip() for word in line if word.strip()]

    head, *lines = map(words, rows())
    assert head == ["day", "account", "requests", "input", "cached", "output", "reasoning", "cost USD"]
    assert lines == [
        ["2027-01-15", "of a", "3", "30", "12", "15", "6", "0.0000063"],
        ["2027-01-16", "of b", "3", "30", "12", "15", "6", "0.0000063"],
        ["total", "6", "60", "24", "30", "12", "0.0000126"],
    ]
    by_key = [words(line)[0] for line in rows("--by", "key")]
    assert by_key == ["key", f"a ({keys['a'][:19]})", f"b ({keys['b'][:19]})", "total"]
    assert words(rows("--by", "hour")[1])[:2] == ["2027-01-15 08:00", "3"]
    assert words(rows("--account", "of b", "--by", "model")[1])[:2] == ["ernie", "3"]
    assert words(rows("--key", "a", "--project", "default", "--model", "ernie", "--by", "")[-1])[0] == "3"
    csv = run("usage", *span, "--csv")[1].splitlines()
    assert len(csv) == 1 + 6
    lines = run("usage", *span, "--json", "--key", "a")[1].splitlines()
    assert {json.loads(line)["request_id"] for line in lines} == {"a-0", "a-1", "a-2"}
    assert {json.loads(line)["cost_usd"] for line in lines} == {"0.0000021"}


def test_prices_are_listed_by_version_with_since_when_they_hold(run: Run, shop: Shop) -> None:
    async def scenario() -> None:
        for cached in (70, 7):
            async with shop.open(Prices(cached_nano=cached)):
                shop.clock.move(86_400)

    run("keys", "create", "k")
    asyncio.run(scenario())
    head, *lines = (re.split(" {2,}", line.strip()) for line in run("prices")[1].splitlines())
    assert head == ["version", "model", "input", "cached", "output", "since"]
    assert lines == [
        ["1", "ernie", "0.07", "0.07", "0.28", "2027-01-15 08:00"],
        ["2", "ernie", "0.07", "0.007", "0.28", "2027-01-16 08:00"],
    ]


def test_an_audit_says_that_all_adds_up_or_what_does_not(run: Run, shop: Shop) -> None:
    spend(shop, {"a": last_line(run("keys", "create", "a", "--credit", "1")[1])}, 2)
    assert run("audit") == (0, "Every balance, every hold and every day's usage is the sum of its rows.\n", "")
    with office(shop.url) as desk:
        desk(Connection.exec_driver_sql, "UPDATE account SET balance_nano = balance_nano + 1")
        desk(Connection.exec_driver_sql, "UPDATE usage_day SET requests = requests + 1, prompt = prompt - 1")
    code, out, err = run("audit")
    assert (code, err) == (1, "")
    balance, requests, prompt = out.splitlines()
    assert balance.endswith(": balance is 999995801, counted 999995800 nano-USD")
    assert requests.startswith("day 2027-01-15, account acct_")
    assert requests.endswith(", model ernie: requests is 3, counted 2")
    assert prompt.endswith(", model ernie: prompt is 19, counted 20")


def test_an_audit_looks_at_one_moment(shop: Shop) -> None:
    with office(shop.url) as desk, office(shop.url) as other:

        def look(connection: Connection) -> list[int]:
            counts = [len(list_keys(connection))]
            other(open_key, "another", now=NOW)
            return [*counts, len(list_keys(connection))]

        assert desk.read(look) == [0, 0]
        assert desk.read(look) == [1, 1]


def command(url: str, *arguments: str) -> str:
    """Run a command as its own process, as somebody does beside a server."""
    environ = os.environ | {"ERNIE_SERVE_DATABASE_URL": url}
    done = subprocess.run(
        [sys.executable, "-m", "ernie_serve", *arguments], capture_output=True, text=True, env=environ, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_act_on_a_running_server(shop: Shop) -> None:
    def order(name: str) -> Order:
        return Order(request_id=name, model="ernie", prompt_tokens=100, max_tokens=50, most_tokens=1000)

    async def scenario() -> None:
        async with shop.open() as meter:

            async def tell(*arguments: str) -> str:
                return await asyncio.to_thread(command, shop.url, *arguments)

            key = last_line(await tell("keys", "create", "k", "--account", "acme"))
            caller = await meter.authenticate(key)
            with pytest.raises(PaymentRequired):
                await meter.reserve(caller, order("poor"))
            await tell("topup", "acme", "0.000021")
            running = await meter.reserve(caller, order("paid"))
            with pytest.raises(PaymentRequired):
                await meter.reserve(caller, order("poor again"))
            await tell("topup", "acme", "1")
            await tell("keys", "limit", "k", "--max-concurrent", "1")
            shop.clock.move(5)
            with pytest.raises(RateLimited, match="1 requests running"):
                await meter.reserve(await meter.authenticate(key), order("second"))
            await meter.settle(running, Usage(prompt_tokens=100, completion_tokens=50), "ok")
            assert "0.000021" in await tell("usage", "--since", "2027-01-01", "--until", "2027-02-01")
            await tell("keys", "disable", "k")
            shop.clock.move(5)
            with pytest.raises(Unauthorized):
                await meter.authenticate(key)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("text", "ahead", "seconds"),
    [
        ("90m", False, NOW - 5400),
        ("12h", True, NOW + 43_200),
        ("30d", True, NOW + 30 * 86_400),
        ("4w", False, NOW - 28 * 86_400),
        ("99999w", False, 0),
        ("2027-01-15", False, NOW - NOW % 86_400),
        ("2027-01-15T08:00", False, NOW),
        ("2027-01-15T10:00+02:00", True, NOW),
        (" 2027-01-15T08:00Z ", True, NOW),
    ],
)
def test_times_are_dates_or_distances(text: str, ahead: bool, seconds: int) -> None:
    assert parse_time(text, "--since", NOW, ahead=ahead) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1y", "1800000000", "-1d", "1.5h", "1969-01-01", "9999999d"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="is no time"):
        parse_time(text, "--since", NOW)


def test_a_name_that_is_no_text_is_that_of_nothing(run: Run) -> None:
    assert "There is no account" in run("topup", "\udcff", "1")[2]
    assert "There is no account" in run("bookings", "--account", "\udcff")[2]
    for words in (("keys", "disable", "\udcff"), ("keys", "limit", "\udcff", "--rpm", "1")):
        assert "There is no key" in run(*words)[2]
