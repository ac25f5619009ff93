"""What was booked by hand is read back, whatever requests cost beside it."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import Connection, event
from stores import Shop

from ernie_serve.billing.bookings import Booking, given_ref, list_bookings
from ernie_serve.billing.meter import Order
from ernie_serve.billing.office import office, open_key, top_up
from ernie_serve.billing.prices import Usage
from ernie_serve.errors import SettingsError


def test_bookings_are_listed_in_order_page_by_page_and_without_requests(shop: Shop) -> None:
    async def scenario() -> None:
        async with shop.open() as meter:
            new = await shop.new_key(meter, 10**9, account="acme")
            caller = await meter.authenticate(new.key)
            order = Order(request_id="r", model="ernie", prompt_tokens=10, most_tokens=9)
            await meter.settle(await meter.reserve(caller, order), Usage(prompt_tokens=10), "ok")
            await meter.change(top_up, "acme", 5, now=6, ref=given_ref("invoice 7"))
            await meter.change(top_up, "acme", -2, now=7, kind="adjust")
            other = await shop.new_key(meter, 0, account="other")
            await meter.change(top_up, "other", 3, now=8, kind="refund", ref=given_ref("ref:odd"))
            every = await meter.report(list_bookings)
            told = [(each.account_name, each.kind, each.nano, each.reference) for each in every]
            assert told == [
                ("acme", "topup", 10**9, None),
                ("acme", "topup", 5, "invoice 7"),
                ("acme", "adjust", -2, None),
                ("other", "refund", 3, "ref:odd"),
            ]
            assert every[1].created == 6
            assert await meter.report(list_bookings, new.account_id) == every[:3]
            assert await meter.report(list_bookings, other.account_id) == every[3:]
            assert await meter.report(list_bookings, after=every[0].id, limit=2) == every[1:3]
            assert await meter.report(list_bookings, after=every[3].id) == []

    asyncio.run(scenario())


def test_a_reference_that_was_used_says_for_what(url: str) -> None:
    with office(url) as desk:
        account_id = desk(open_key, "k", now=1, account="acme").account_id
        desk(open_key, "k", now=1, account="other")
        desk(top_up, "acme", 7 * 10**9, now=1_800_000_000, ref=given_ref("invoice 7"))
        told = (
            rf"reference `invoice 7` .* 7 USD as topup to the account acme \({account_id}\) on 2027-01-15 08:00 UTC\."
        )
        for account, nano, kind in (("other", 7 * 10**9, "topup"), ("acme", 8, "topup"), ("acme", 7 * 10**9, "refund")):
            with pytest.raises(SettingsError, match=told):
                desk(top_up, account, nano, now=1_900_000_000, kind=kind, ref=given_ref("invoice 7"))


def test_the_list_does_not_look_at_what_requests_cost(small_shop: Shop) -> None:
    plans: list[str] = []

    def read(connection: Connection) -> list[Booking]:
        event.listen(connection, "before_cursor_execute", explain)
        return list_bookings(connection)

    def explain(connection: Connection, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        raw: Any = connection.connection.driver_connection
        plans.extend(row[3] for row in raw.execute(f"EXPLAIN QUERY PLAN {statement}", parameters))

    async def scenario() -> None:
        async with small_shop.open() as meter:
            await meter.report(read)

    asyncio.run(scenario())
    assert any("ledger_by_hand" in step for step in plans), plans
