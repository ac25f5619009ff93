"""What was used, by time and by whom; and that an export is all of it."""

import asyncio
import csv
import io
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from ernie_serve.billing.meter import Order
from ernie_serve.billing.office import office
from ernie_serve.billing.prices import Usage
from ernie_serve.billing.reports import (
    Scope,
    export,
    export_head,
    find_usage,
    list_usage,
    problems,
    spending,
    usage_by_time,
)
from ernie_serve.errors import InvalidRequest

DAY = 86_400
START = 1_800_000_000 - 1_800_000_000 % DAY


async def spend(shop, meter, caller, times, model="ernie"):
    for at in times:
        shop.clock.seconds = at
        order = Order(request_id=f"{caller.key_id}-{at}", model=model, prompt_tokens=10, max_tokens=5, most_tokens=9)
        usage = Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=4, reasoning_tokens=1)
        await meter.settle(await meter.reserve(caller, order), usage, "ok", finish_reason="stop", total_us=7)


COST = 10 * 70 + 5 * 280


def test_sums_by_time_and_group_are_those_of_the_rows(shop):
    async def scenario():
        async with shop.open() as meter:
            a = await shop.caller(meter, account="a")
            b = await shop.caller(meter, account="a", name="b", project="other")
            stranger = await shop.caller(meter, account="stranger")
            await spend(shop, meter, a, [START + 5, START + 65, START + 3600, START + DAY, START + 2 * DAY])
            await spend(shop, meter, b, [START + 7, START + 3 * DAY])
            await spend(shop, meter, stranger, [START + 8])
            mine = Scope(account_id=a.account_id)

            page = await meter.report(usage_by_time, mine, start=START, end=START + 4 * DAY)
            assert [bucket.start for bucket in page.buckets] == [START + day * DAY for day in range(4)]
            assert [sums.requests for bucket in page.buckets for sums in bucket.results] == [4, 1, 1, 1]
            first = page.buckets[0].results[0]
            assert (first.prompt, first.cached, first.completion, first.reasoning) == (40, 16, 20, 4)
            assert (first.cost_nano, first.project_id, page.next_page) == (4 * COST, None, None)

            page = await meter.report(
                usage_by_time, mine, start=START, end=START + DAY, group_by=["project_id", "key_id"]
            )
            found = {(sums.project_id, sums.key_id): sums.requests for sums in page.buckets[0].results}
            assert found == {(a.project_id, a.key_id): 3, (b.project_id, b.key_id): 1}

            page = await meter.report(usage_by_time, mine, start=START, end=START + 7200, width="1h")
            assert [sum(sums.requests for sums in bucket.results) for bucket in page.buckets] == [3, 1]
            page = await meter.report(usage_by_time, mine, start=START + 6, end=START + 66, width="1m")
            assert [sum(sums.requests for sums in bucket.results) for bucket in page.buckets] == [1, 1]

            everybody = await meter.report(
                usage_by_time, Scope(), start=START, end=START + DAY, group_by=["account_id"]
            )
            assert Counter({sums.account_id: sums.requests for sums in everybody.buckets[0].results}) == {
                a.account_id: 4,
                stranger.account_id: 1,
            }

    asyncio.run(scenario())


@pytest.mark.parametrize("width", ["1d", "1h"])
def test_pages_are_the_whole(shop, width):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            await spend(shop, meter, caller, range(START, START + 3 * DAY, 7 * 3600))
            seen, page_start = [], None
            for _ in range(100):
                page = await meter.report(
                    usage_by_time, Scope(), start=START, end=START + 3 * DAY, width=width, limit=2, page=page_start
                )
                assert len(page.buckets) == 2 or page.next_page is None
                seen += page.buckets
                page_start = page.next_page
                if page_start is None:
                    break
            assert [bucket.start for bucket in seen] == list(
                range(START, START + 3 * DAY, DAY if width == "1d" else 3600)
            )
            assert sum(sums.requests for bucket in seen for sums in bucket.results) == 11

    asyncio.run(scenario())


@pytest.mark.parametrize(("width", "apart"), [("1m", 7), ("1h", 600)])
def test_spans_that_meet_are_the_whole(shop, width, apart):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            await spend(shop, meter, caller, range(START, START + 20 * apart, apart))
            for middle in (START + 3 * apart, START + 11 * apart - 1, START + 11 * apart, START + 11 * apart + 1):
                counts = []
                for start, end in ((START, middle), (middle, START + 20 * apart)):
                    page = await meter.report(usage_by_time, Scope(), start=start, end=end, width=width)
                    assert page.buckets[0].start == start - start % (60 if width == "1m" else 3600)
                    counts.append(sum(sums.requests for bucket in page.buckets for sums in bucket.results))
                assert counts == [-(-(middle - START) // apart), 20 - -(-(middle - START) // apart)]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"group_by": ["model", "model"]}, "group_by"),
        ({"limit": 367}, "limit"),
        ({"limit": 169, "width": "1h"}, "limit"),
        ({"limit": 1441, "width": "1m"}, "limit"),
    ],
)
def test_what_is_not_offered_is_refused(small_shop, given, param):
    async def scenario():
        async with small_shop.open() as meter:
            with pytest.raises(InvalidRequest) as refused:
                await meter.report(usage_by_time, Scope(), **({"start": START, "end": START + DAY} | given))
            assert refused.value.param == param

    asyncio.run(scenario())


def test_a_row_is_found_by_its_owner_only(shop):
    async def scenario():
        async with shop.open() as meter:
            caller, stranger = await shop.caller(meter, account="a"), await shop.caller(meter, account="b")
            await spend(shop, meter, caller, [START])
            name = f"{caller.key_id}-{START}"
            row = await meter.report(find_usage, name, Scope(account_id=caller.account_id))
            assert (row.cost_nano, row.finish_reason, row.total_us, row.created) == (COST, "stop", 7, START)
            assert await meter.report(find_usage, name, Scope(account_id=stranger.account_id)) is None

    asyncio.run(scenario())


def test_spending_is_by_day_week_month_and_ever(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            friday = START  # 15 January 2027
            await spend(
                shop, meter, caller, [friday - 20 * DAY, friday - 5 * DAY, friday - 4 * DAY, friday - 1, friday]
            )
            beside = await shop.caller(meter, name="beside")
            await spend(shop, meter, beside, [friday - 20 * DAY, friday])
            await spend(shop, meter, await shop.caller(meter, project="other"), [friday])
            told = await meter.report(spending, caller, friday + 100)
            assert (told.day_nano, told.week_nano, told.month_nano, told.total_nano) == (
                COST,
                3 * COST,
                4 * COST,
                5 * COST,
            )
            assert told.project_month_nano == 5 * COST
            nothing = await meter.report(spending, await shop.caller(meter, name="new", account="new"), friday)
            assert (nothing.day_nano, nothing.total_nano, nothing.project_month_nano) == (0, 0, 0)

    asyncio.run(scenario())


def test_the_columns_of_an_export_are_told_in_their_order():
    text = (Path(__file__).parents[2] / "docs/billing.md").read_text(encoding="utf-8")
    told = text.split("## Exports", 1)[1].split("\n## ", 1)[0]
    columns = export_head("csv").decode().strip().split(",")
    heads = [line.split("|")[1] for line in told.splitlines() if line.startswith("| `")]
    assert [name for head in heads for name in re.findall(r"`(\w+)`", head)] == columns


def test_a_request_that_we_failed_keeps_its_tokens_and_costs_nothing(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            order = Order(request_id="r", model="ernie", prompt_tokens=10, max_tokens=5, most_tokens=9)
            usage = Usage(prompt_tokens=10, completion_tokens=5)
            await meter.settle(await meter.reserve(caller, order), usage, "failed", finish_reason="error")
            row = await meter.report(find_usage, "r", Scope())
            assert (row.prompt, row.completion, row.cost_nano, row.status) == (10, 5, 0, "failed")

    asyncio.run(scenario())


def test_what_a_clock_that_ran_ahead_has_charged_is_spent_on_its_own_days(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            friday = START
            monday, february, march = friday + 3 * DAY, friday + 17 * DAY, friday + 45 * DAY
            await spend(shop, meter, caller, [friday, friday + DAY, monday, february, march])
            told = await meter.report(spending, caller, friday)
            assert (told.day_nano, told.week_nano, told.month_nano, told.total_nano) == (
                COST,
                2 * COST,
                3 * COST,
                5 * COST,
            )
            assert told.project_month_nano == 3 * COST

    asyncio.run(scenario())


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_an_export_is_every_row_however_it_is_paged(shop, form, monkeypatch):
    monkeypatch.setattr("ernie_serve.billing.reports.EXPORT_PAGE", 3)

    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            for index in range(4):  # several in the same second
                other = await shop.caller(meter, name=f"k{index}")
                await spend(shop, meter, other, [START, START + 1])
            await spend(shop, meter, caller, [START + DAY])
            span = {"start": START, "end": START + DAY}
            with office(shop.url) as desk:
                text = b"".join(export(desk.read, Scope(), form, **span)).decode()
            rows = list(csv.DictReader(io.StringIO(text))) if form == "csv" else [*map(json.loads, text.splitlines())]
            assert len({row["request_id"] for row in rows}) == len(rows) == 8
            assert {row["cost_usd"] for row in rows} == {"0.0000021"}
            assert sum(int(row["cost_nano"]) for row in rows) == 8 * COST

    asyncio.run(scenario())


def test_lists_go_on_after_the_last_row_seen(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            await spend(shop, meter, caller, [START + 9, START + 3, START + 6])
            first = await meter.report(list_usage, Scope(), start=0, end=START + DAY, limit=2)
            after = (first[-1].created, first[-1].request_id)
            rest = await meter.report(list_usage, Scope(), start=0, end=START + DAY, after=after)
            assert [row.created - START for row in first + rest] == [3, 6, 9]

    asyncio.run(scenario())


def test_whatever_does_not_add_up_is_told(small_shop):
    async def scenario():
        async with small_shop.open() as meter:
            caller = await small_shop.caller(meter)
            await spend(small_shop, meter, caller, [START])
            for damage, told in (
                ("UPDATE account SET balance_nano = balance_nano + 1", "balance is"),
                ("UPDATE account SET reserved_nano = 1", "reserved is"),
                ("UPDATE usage_event SET cost_nano = 1", "usage is"),
                ("UPDATE usage_day SET requests = 2", "requests is 2, counted 1"),
            ):

                def look(connection, damage=damage):
                    point = connection.begin_nested()
                    connection.exec_driver_sql(damage)
                    found = problems(connection)
                    point.rollback()
                    return found

                assert any(told in each for each in await meter.change(look)), damage

    asyncio.run(scenario())
