"""The meter of one person on one machine."""

import asyncio

import pytest

from ernie_serve.billing.free import FreeMeter
from ernie_serve.billing.meter import Meter, Order
from ernie_serve.billing.paid import PaidMeter
from ernie_serve.billing.prices import Usage
from ernie_serve.billing.reports import Scope, usage_by_time
from ernie_serve.errors import Unauthorized, UnknownUrl


def test_everything_is_free_and_nothing_is_kept():
    async def scenario():
        meter: Meter = FreeMeter()
        caller = await meter.authenticate(None)
        caller.require("admin")
        order = Order(request_id="r", model="m", prompt_tokens=10**6, max_tokens=None, most_tokens=131_072, n=8)
        reservation = await meter.reserve(caller, order)
        assert await reservation.cover(8 * 131_072)
        assert not reservation.exhausted
        usage = Usage(prompt_tokens=5, completion_tokens=6)
        charge = await meter.settle(reservation, usage, "ok")
        assert (charge.cost_nano, charge.cost_usd, charge.usage, meter.charges) == (0, "0", usage, False)
        assert await meter.settle(reservation, Usage(prompt_tokens=7, completion_tokens=8), "failed") == charge
        assert meter.counters.settled == 1, "the first charge is the only one"
        assert meter.rate_headers(caller) == {}
        for refused in (
            lambda: meter.report(usage_by_time, Scope(), start=0, end=1),
            lambda: meter.change(usage_by_time, Scope(), start=0, end=1),
        ):
            with pytest.raises(UnknownUrl, match="--billing"):
                await refused()
        await meter.close()

    asyncio.run(scenario())


def test_keys_of_the_settings_are_asked_for():
    async def scenario():
        meter = FreeMeter(["one", "zwei-é"])
        for key in ("one", "zwei-é"):
            assert (await meter.authenticate(key)).key_id == "local"
        for key in (None, "", "One", "onetwo"):
            with pytest.raises(Unauthorized, match="Incorrect API key provided"):  # by which LiteLLM knows it
                await meter.authenticate(key)

    asyncio.run(scenario())


def test_both_meters_answer_the_same_questions():
    asked = {name for name in vars(Meter) if not name.startswith("_")}
    for meter in (FreeMeter, PaidMeter):
        assert asked - {"charges", "counters"} <= set(vars(meter))


def test_keys_are_told_apart_and_nobody_is_without_keys():
    async def scenario():
        keyed = FreeMeter(["one", "two"])
        accounts = {(await keyed.authenticate(key)).account_id for key in ("one", "two")}
        assert len(accounts) == 2
        assert all(accounts)
        assert (await FreeMeter().authenticate("anything")).account_id == ""

    asyncio.run(scenario())
