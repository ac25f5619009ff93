"""The meter that charges, on both stores: holds, leases, charges and refusals."""

import asyncio
from typing import Any

import pytest

from ernie_serve.billing.accounts import disable_key, set_account_status, set_project_limit
from ernie_serve.billing.keys import KeyLimits
from ernie_serve.billing.meter import LEASE_TOKENS, AlreadyAnswered, Order
from ernie_serve.billing.office import top_up
from ernie_serve.billing.price_lists import set_prices
from ernie_serve.billing.prices import Prices, Usage
from ernie_serve.billing.reports import Scope, find_usage
from ernie_serve.errors import (
    Forbidden,
    IdempotencyMismatch,
    PaymentRequired,
    RateLimited,
    RequestConflict,
    SettingsError,
    Unauthorized,
)


def order(request_id: str = "r", prompt: int = 100, max_tokens: int | None = 50, **given: Any) -> Order:
    given.setdefault("most_tokens", 100_000)
    return Order(request_id=request_id, model="ernie", prompt_tokens=prompt, max_tokens=max_tokens, **given)


COST = 100 * 70 + 50 * 280
FULL = Usage(prompt_tokens=100, completion_tokens=50)


def test_what_was_computed_is_charged_and_the_hold_is_gone(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter, 100_000)
            reservation = await meter.reserve(caller, order())
            held = await shop.account(meter, caller)
            assert (held.balance_nano, held.reserved_nano) == (100_000, COST)
            charge = await meter.settle(
                reservation,
                Usage(prompt_tokens=100, completion_tokens=7, reasoning_tokens=3),
                "ok",
                finish_reason="stop",
            )
            assert (charge.cost_nano, charge.cost_usd, charge.kept) == (100 * 70 + 7 * 280, "0.00000896", True)
            after = await shop.account(meter, caller)
            assert (after.balance_nano, after.reserved_nano) == (100_000 - 8960, 0)
            row = await meter.report(find_usage, "r", Scope(account_id=caller.account_id))
            assert (row.cost_nano, row.completion, row.reasoning, row.finish_reason) == (8960, 7, 3, "stop")

    asyncio.run(scenario())


def test_a_balance_for_seventeen_pays_for_exactly_seventeen_of_two_hundred(shop):
    async def attempt(meter, caller, index):
        try:
            reservation = await meter.reserve(caller, order(f"r{index}"))
        except PaymentRequired:
            return 402
        await asyncio.sleep(0)
        await meter.settle(reservation, FULL, "ok")
        return 200

    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter, 17 * COST + COST - 1)
            answers = await asyncio.gather(*(attempt(meter, caller, index) for index in range(200)))
            assert (answers.count(200), answers.count(402)) == (17, 183)
            assert (await shop.account(meter, caller)).balance_nano == COST - 1

    asyncio.run(scenario())


def test_every_kind_of_request_that_is_not_answered(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            for name, usage, status, cost in (
                ("ours", FULL, "failed", 0),
                ("left in the queue", Usage(), "cancelled", 0),
                ("left in the prompt", Usage(prompt_tokens=40), "cancelled", 40 * 70),
                ("left while reading", Usage(prompt_tokens=100, completion_tokens=9), "cancelled", 100 * 70 + 9 * 280),
                ("empty", Usage(), "ok", 0),
            ):
                charge = await meter.settle(await meter.reserve(caller, order(name)), usage, status)
                assert charge.cost_nano == cost, name
            assert (await shop.account(meter, caller)).reserved_nano == 0

    asyncio.run(scenario())


def test_settling_again_charges_nothing_more(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            reservation = await meter.reserve(caller, order())
            first = await meter.settle(reservation, FULL, "ok")
            assert await meter.settle(reservation, Usage(), "failed") == first
            again = await meter.reserve(caller, order("other"))
            again.order = order()  # the same request, as after a commit whose answer was lost
            assert (await meter.settle(again, Usage(), "ok")).cost_nano == COST
            again.order, again.charge = order("other"), None
            await meter.settle(again, Usage(), "failed")
            assert (await shop.account(meter, caller)).balance_nano == 10**9 - COST

    asyncio.run(scenario())


def test_a_request_that_cannot_be_paid_is_told_both_numbers_and_holds_nothing(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter, 100 * 70 + 39 * 280)
            told = (
                r"needs more credit, or fewer .* requested up to 50 tokens, but can only afford 39\b.* balance leaves "
            )
            with pytest.raises(PaymentRequired, match=told + "0.00001792 USD"):
                await meter.reserve(caller, order())
            with pytest.raises(PaymentRequired, match="can only afford 0"):
                await meter.reserve(caller, order(prompt=1000))
            with pytest.raises(PaymentRequired, match="afford 19"):
                await meter.reserve(caller, order(n=2))
            assert (await shop.account(meter, caller)).reserved_nano == 0
            assert meter.counters.refused_payment == 3

    asyncio.run(scenario())


def test_without_max_tokens_a_lease_is_held_and_extended_ahead_of_need(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            reservation = await meter.reserve(caller, order(max_tokens=None, most_tokens=3000))
            assert reservation.covered == LEASE_TOKENS
            assert await reservation.cover(LEASE_TOKENS - 257)
            assert reservation._extending is None
            assert await reservation.cover(LEASE_TOKENS - 255)  # paid for, and the next lease is asked for already
            assert reservation._extending is not None
            for produced in range(LEASE_TOKENS - 254, 3001):
                assert await reservation.cover(produced)
            assert reservation.covered == 3000
            assert not await reservation.cover(3001)
            assert (await shop.account(meter, caller)).reserved_nano == 100 * 70 + 3000 * 280
            charge = await meter.settle(reservation, Usage(prompt_tokens=100, completion_tokens=2000), "ok")
            assert charge.cost_nano == 100 * 70 + 2000 * 280

    asyncio.run(scenario())


def test_a_cent_serves_a_client_that_names_no_max_tokens(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter, 10_000_000)
            reservation = await meter.reserve(caller, order(max_tokens=None, most_tokens=131_000))
            assert reservation.covered == LEASE_TOKENS
            await meter.settle(reservation, FULL, "ok")

    asyncio.run(scenario())


def test_a_lease_that_cannot_be_extended_covers_what_is_left_and_ends(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter, 100 * 70 + 1500 * 280)
            reservation = await meter.reserve(caller, order(max_tokens=None))
            sent = 0
            while await reservation.cover(sent + 10):
                sent += 10
            assert (sent, reservation.covered, reservation.exhausted) == (1500, 1500, True)
            charge = await meter.settle(reservation, Usage(prompt_tokens=100, completion_tokens=1600), "ok")
            assert (charge.usage.completion_tokens, charge.cost_nano) == (1500, 100 * 70 + 1500 * 280)
            assert (await shop.account(meter, caller)).balance_nano == 0

    asyncio.run(scenario())


def test_what_a_key_has_running_goes_on_when_it_is_disabled_and_is_charged(shop):
    async def scenario():
        async with shop.open() as meter:
            new = await shop.new_key(meter)
            caller = await meter.authenticate(new.key)
            running = await meter.reserve(caller, order(max_tokens=None, most_tokens=5000))
            await meter.change(disable_key, new.key_id, 1)
            with pytest.raises(Unauthorized):
                await meter.authenticate(new.key)
            assert await running.cover(3000)
            usage = Usage(prompt_tokens=100, completion_tokens=3000)
            assert (await meter.settle(running, usage, "ok")).cost_nano == 100 * 70 + 3000 * 280

    asyncio.run(scenario())


def test_an_open_end_needs_credit_for_a_beginning(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter, 100 * 70 + 255 * 280)
            with pytest.raises(
                PaymentRequired, match=r"without it .* at least 256 tokens, and you can only afford 255"
            ):
                await meter.reserve(caller, order(max_tokens=None))
            few = await meter.reserve(caller, order(max_tokens=None, most_tokens=200))
            assert few.covered == 200
            await meter.settle(few, Usage(), "failed")

    asyncio.run(scenario())


def test_the_narrowest_of_balance_and_limits_is_the_one_that_is_told(shop):
    async def scenario():
        async with shop.open() as meter:
            for credit, key_limit, project_limit, told in (
                (1, 2, 3, "more credit"),
                (2, 1, 3, "limit of its key"),
                (3, 2, 1, "limit of its project"),
            ):
                limits = KeyLimits(month_nano=key_limit)
                new = await shop.new_key(meter, credit, limits=limits, account=told)
                await meter.change(set_project_limit, new.project_id, project_limit)
                with pytest.raises(PaymentRequired, match=told):
                    await meter.reserve(await meter.authenticate(new.key), order())

    asyncio.run(scenario())


def test_a_price_change_is_for_requests_that_begin_later(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            before = await meter.reserve(caller, order("before"))
            other = Prices(input_nano=1, cached_nano=1, output_nano=2)
            meter.prices = await meter.change(set_prices, "ernie", other, int(shop.clock.seconds))
            after = await meter.reserve(caller, order("after"))
            old, new = await meter.settle(before, FULL, "ok"), await meter.settle(after, FULL, "ok")
            assert (old.cost_nano, new.cost_nano) == (COST, 100 + 100)
            assert new.price_version == old.price_version + 1
            row = await meter.report(find_usage, "before", Scope())
            assert (row.cost_nano, row.price_version) == (COST, old.price_version)
        async with shop.open() as meter:
            assert meter.prices.version == new.price_version + 1  # the settings say the old prices: a third list
        async with shop.open() as meter:
            assert meter.prices.version == new.price_version + 1  # and saying them again changes nothing

    asyncio.run(scenario())


@pytest.mark.parametrize("whose", ["key", "project"])
def test_a_monthly_limit_holds_within_its_month(shop, whose):
    async def scenario():
        async with shop.open() as meter:
            limit = 3 * COST
            limits = KeyLimits(month_nano=limit if whose == "key" else None)
            new = await shop.new_key(meter, limits=limits)
            if whose == "project":
                await meter.change(set_project_limit, new.project_id, limit)
            caller = await meter.authenticate(new.key)
            for index in range(2):
                await meter.settle(await meter.reserve(caller, order(f"r{index}")), FULL, "ok")
            third = await meter.reserve(caller, order("third"))
            told = f"a higher monthly limit of its {whose}, a new month, or fewer .* can only afford 0.* "
            told += f"the {whose}'s monthly limit leaves 0 USD until the month ends, in UTC"
            with pytest.raises(PaymentRequired, match=told):
                await meter.reserve(caller, order("fourth"))
            await meter.settle(third, FULL, "ok")
            shop.clock.move(31 * 86_400)
            await meter.settle(await meter.reserve(caller, order("next month")), FULL, "ok")
            with pytest.raises(PaymentRequired, match="can only afford 150"):
                await meter.reserve(caller, order("open end", prompt=0, max_tokens=None))

    asyncio.run(scenario())


def test_what_a_clock_that_ran_ahead_has_charged_counts_in_no_other_month(shop):
    async def scenario():
        async with shop.open() as meter:
            new = await shop.new_key(meter, limits=KeyLimits(month_nano=COST))
            caller = await meter.authenticate(new.key)
            for index, days in enumerate((62, -62, 31)):
                shop.clock.move(days * 86_400)
                await meter.settle(await meter.reserve(caller, order(f"r{index}")), FULL, "ok")
            shop.clock.move(31 * 86_400)
            with pytest.raises(PaymentRequired, match="can only afford 0"):
                await meter.reserve(caller, order("charged for already"))

    asyncio.run(scenario())


def test_rates_are_exact_and_refused_requests_take_nothing(shop):
    async def scenario():
        async with shop.open() as meter:
            limits = KeyLimits(requests_per_minute=3, tokens_per_minute=1000)
            caller = await shop.caller(meter, limits=limits)
            reservation = await meter.reserve(caller, order("a"))
            headers = meter.rate_headers(caller)
            assert headers == {
                "x-ratelimit-limit-requests": "3",
                "x-ratelimit-remaining-requests": "2",
                "x-ratelimit-reset-requests": "20s",
                "x-ratelimit-limit-tokens": "1000",
                "x-ratelimit-remaining-tokens": "850",
                "x-ratelimit-reset-tokens": "9s",
            }
            with pytest.raises(RateLimited, match="850 are left and 900 are needed") as refused:
                await meter.reserve(caller, order("b", prompt=850))
            assert refused.value.retry_after_seconds == 3
            await meter.settle(reservation, Usage(prompt_tokens=100, completion_tokens=10), "ok")
            assert meter.rate_headers(caller)["x-ratelimit-remaining-tokens"] == "890"
            for name in ("c", "d"):
                await meter.settle(await meter.reserve(caller, order(name, prompt=1, max_tokens=1)), Usage(), "failed")
            with pytest.raises(RateLimited, match="requests a minute") as refused:
                await meter.reserve(caller, order("e", prompt=1, max_tokens=1))
            assert refused.value.retry_after_seconds == 20
            shop.clock.move(20)
            await meter.settle(await meter.reserve(caller, order("f", prompt=1, max_tokens=1)), Usage(), "failed")

    asyncio.run(scenario())


def test_only_so_many_run_at_once(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter, limits=KeyLimits(concurrent=2))
            running = [await meter.reserve(caller, order(f"r{index}")) for index in range(2)]
            with pytest.raises(RateLimited, match="2 requests running"):
                await meter.reserve(caller, order("third"))
            await meter.settle(running[0], FULL, "ok")
            running.append(await meter.reserve(caller, order("fourth")))
            for reservation in running[1:]:
                await meter.settle(reservation, FULL, "ok")

    asyncio.run(scenario())


def test_a_poor_request_counts_against_no_rate(shop):
    async def scenario():
        async with shop.open() as meter:
            limits = KeyLimits(requests_per_minute=1, tokens_per_minute=150, concurrent=1)
            caller = await shop.caller(meter, 0, limits=limits)
            for _ in range(3):
                with pytest.raises(PaymentRequired):
                    await meter.reserve(caller, order())
            assert meter.rate_headers(caller)["x-ratelimit-remaining-tokens"] == "150"

    asyncio.run(scenario())


def test_a_disabled_key_is_dead_within_five_seconds_in_every_process(shop):
    async def scenario():
        async with shop.open() as meter:
            new = await shop.new_key(meter)
            await meter.authenticate(new.key)
            await meter._store.write(
                lambda connection: disable_key(connection, new.key_id, 1)
            )  # as another process does
            shop.clock.move(4.9)
            await meter.authenticate(new.key)
            shop.clock.move(0.1)
            with pytest.raises(Unauthorized):
                await meter.authenticate(new.key)

    asyncio.run(scenario())


def test_every_bad_key_is_refused_in_the_same_words(shop):
    async def scenario():
        async with shop.open() as meter:
            disabled, expired, closed, good = [
                await shop.new_key(meter, name=name, account=name, expires=expires)
                for name, expires in (("a", None), ("b", int(shop.clock.seconds) + 60), ("c", None), ("d", None))
            ]
            await meter.authenticate(expired.key)
            shop.clock.move(60)
            await meter.change(disable_key, disabled.key_id, 1)
            await meter.change(set_account_status, closed.account_id, active=False)
            wrong = good.key[:-1] + ("A" if good.key[-1] != "A" else "B")
            unknown = good.key.replace(good.key_id, "0" * 16)
            said = set()
            for key in (
                None,
                "",
                "sk-",
                "' OR 1=1 --",
                "sk-\x00",
                "k" * 10_000,
                wrong,
                unknown,
                disabled.key,
                expired.key,
                closed.key,
            ):
                with pytest.raises(Unauthorized, match="Incorrect API key provided") as refused:
                    await meter.authenticate(key)
                said.add(str(refused.value))
            assert len(said) == 1
            assert (await meter.authenticate(good.key)).key_id == good.key_id

    asyncio.run(scenario())


def test_a_key_without_the_scope_cannot_generate(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter, scopes=("read-usage",))
            with pytest.raises(Forbidden, match="inference"):
                await meter.reserve(caller, order())

    asyncio.run(scenario())


def test_a_caller_that_leaves_while_money_is_held_leaves_no_hold(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter, limits=KeyLimits(concurrent=1000))
            for index in range(50):
                task = asyncio.create_task(meter.reserve(caller, order(f"r{index}")))
                for _ in range(index % 4):
                    await asyncio.sleep(0)
                task.cancel()
                try:
                    reservation = await task
                except asyncio.CancelledError:
                    continue
                await meter.settle(reservation, Usage(), "cancelled")
            for _ in range(100):  # what was undone last may still be on its way, in the same lane
                await meter._store.write(lambda connection: None, lane=caller.account_id)
            assert (await shop.account(meter, caller)).reserved_nano == 0
            assert meter._limiter._keys[caller.key_id].running == 0

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_caller_that_leaves_while_settling_is_charged(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter)
            reservation = await meter.reserve(caller, order())
            task = asyncio.ensure_future(meter.settle(reservation, FULL, "cancelled"))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await meter.settle(reservation, Usage(), "failed")).cost_nano == COST

    asyncio.run(scenario())


def test_an_idempotency_key_names_the_request_that_answered(shop):
    async def scenario():
        async with shop.open() as meter:
            caller, stranger = await shop.caller(meter), await shop.caller(meter, name="stranger")
            given = {"idempotency_key": "once", "body_sha256": "abc"}
            first = await meter.reserve(caller, order("first", **given))
            with pytest.raises(RequestConflict):
                await meter.reserve(caller, order("second", **given))
            await meter.settle(first, FULL, "ok")
            with pytest.raises(AlreadyAnswered) as answered:
                await meter.reserve(caller, order("third", **given))
            assert answered.value.request_id == "first"
            with pytest.raises(IdempotencyMismatch):
                await meter.reserve(caller, order("fourth", idempotency_key="once", body_sha256="other"))
            other = await meter.reserve(stranger, order("fifth", **given))
            await meter.settle(other, FULL, "failed")
            again = await meter.reserve(
                stranger, order("sixth", **given)
            )  # a failure is no answer: it may be tried again
            await meter.settle(again, FULL, "ok")
            shop.clock.move(86_400)
            late = await meter.reserve(caller, order("seventh", **given))
            await meter.settle(late, FULL, "ok")

    asyncio.run(scenario())


def test_a_refused_request_gives_its_idempotency_key_back(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter, 0)
            given = {"idempotency_key": "once", "body_sha256": "abc"}
            with pytest.raises(PaymentRequired):
                await meter.reserve(caller, order("first", **given))
            await meter.change(top_up, caller.account_id, COST, now=1)
            await meter.settle(await meter.reserve(caller, order("second", **given)), FULL, "ok")

    asyncio.run(scenario())


def test_a_top_up_counts_once_for_each_reference(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter, 5)
            for _ in range(2):
                assert await meter.change(top_up, caller.account_id, 100, now=1, ref="invoice 7") == 105
            assert await meter.change(top_up, "default", -105, now=1, kind="adjust") == 0
            with pytest.raises(SettingsError, match="cannot be taken"):
                await meter.change(top_up, "default", -1, now=1, kind="adjust")

    asyncio.run(scenario())
