"""What a key is told of itself and of a request."""

import asyncio
from decimal import Decimal
from typing import Any

import pytest
from metered import cost, metered

from ernie_serve.billing.accounts import set_project_limit
from ernie_serve.billing.keys import KeyLimits

SPENT = cost("Hello", 7)


def test_a_key_sees_its_limits_its_spending_and_its_account(shop: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with metered(shop, make_services) as server:
            limits = KeyLimits(requests_per_minute=60, tokens_per_minute=10_000, concurrent=4, month_nano=2 * SPENT)
            new = await server.new_key(credit_nano=10**9 + 1, limits=limits, expires=4_000_000_000)
            await server.complete(new.key, "Hello", 7)
            told = (await server.get("/v1/key", new.key))["data"]
            spent = Decimal(SPENT) / 10**9
            assert told == {
                "label": f"sk-{new.key_id}",
                "name": "test",
                "usage": spent,
                "usage_nano_usd": SPENT,
                "usage_daily": spent,
                "usage_weekly": spent,
                "usage_monthly": spent,
                "limit": 2 * spent,
                "limit_reset": "monthly",
                "limit_remaining": spent,
                "limit_of": "key",
                "is_free_tier": False,
                "is_provisioning_key": False,
                "include_byok_in_limit": False,
                "expires_at": "2096-10-02T07:06:40Z",
                "rate_limit": {"requests": 60, "interval": "1m"},
                "tokens_per_minute": 10_000,
                "max_concurrent": 4,
                "scopes": ["inference", "read-usage"],
                "project_id": new.project_id,
                "account": {
                    "id": new.account_id,
                    "balance": Decimal(10**9 + 1 - SPENT) / 10**9,
                    "balance_nano_usd": 10**9 + 1 - SPENT,
                    "reserved": 0,
                    "reserved_nano_usd": 0,
                },
            }
            assert new.key not in str(told)

    asyncio.run(scenario())


def test_a_key_without_limits_says_so(small_shop: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            told = (await server.get("/v1/key", (await server.new_key()).key))["data"]
            assert (told["limit"], told["limit_reset"], told["limit_remaining"]) == (None, None, None)
            assert told["limit_of"] is None
            assert told["rate_limit"]["requests"] == -1
            assert told["expires_at"] is None

    asyncio.run(scenario())


def test_of_two_monthly_limits_the_one_that_leaves_less_is_told(shop: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with metered(shop, make_services) as server:
            new = await server.new_key(limits=KeyLimits(month_nano=5 * SPENT))
            beside = await server.new_key(name="beside")
            for key in (new.key, beside.key, beside.key):
                await server.complete(key, "Hello", 7)
            for project, whose, limit, left in (
                (8, "key", 5, 4),
                (7, "key", 5, 4),
                (6, "project", 6, 3),
                (2, "project", 2, 0),
            ):
                await server.meter.change(set_project_limit, new.project_id, project * SPENT)
                told = (await server.get("/v1/key", new.key))["data"]
                assert (told["limit_of"], told["limit_reset"]) == (whose, "monthly")
                assert (told["limit"] * 10**9, told["limit_remaining"] * 10**9) == (limit * SPENT, left * SPENT)
                assert told["usage_monthly"] * 10**9 == SPENT
            only = (await server.get("/v1/key", beside.key))["data"]
            assert (only["limit_of"], only["limit"] * 10**9) == ("project", 2 * SPENT)

    asyncio.run(scenario())


def test_a_request_is_told_by_the_id_of_its_answer(shop: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with metered(shop, make_services) as server:
            new = await server.new_key()
            answer = await server.complete(new.key, "Hello", 7)
            told = (await server.get("/v1/generation", new.key, id=answer["id"]))["data"]
            assert told["id"] == answer["id"]
            assert told["model"] == answer["model"]
            assert told["total_cost"] == told["usage"] == answer["usage"]["cost"] == Decimal(SPENT) / 10**9
            assert told["cost_nano_usd"] == answer["usage"]["cost_nano_usd"] == SPENT
            assert (told["native_tokens_prompt"], told["native_tokens_completion"]) == (5, 7)
            assert (told["finish_reason"], told["status"], told["cancelled"]) == ("length", "ok", False)
            assert told["generation_time"] + told["latency"] == told["total_time"]
            assert "Hello" not in str(told)

    asyncio.run(scenario())


def test_a_request_is_told_to_its_project_and_to_admins_alone(small_shop: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            mine = await server.new_key(account="a")
            answer = await server.complete(mine.key)
            beside = await server.new_key(account="a", name="beside")
            admin = await server.new_key("admin", account="root")
            for key in (beside.key, admin.key):
                assert (await server.get("/v1/generation", key, id=answer["id"]))["data"]["id"] == answer["id"]
            for other in ({"account": "a", "project": "other"}, {"account": "b"}):
                stranger = await server.new_key(**other)
                for wanted in (answer["id"], "nothing"):
                    refused = await server.ask("GET", f"/v1/generation?id={wanted}", stranger.key)
                    assert refused.status_code == 404
                    assert refused.json()["error"]["message"].startswith(f"No request `{wanted}`")
            for query in ("", "?id=a&id=b", "?id=a&x=1", "?id=" + "a" * 200):
                assert (await server.ask("GET", f"/v1/generation{query}", mine.key)).status_code == 400
            told = (await server.ask("GET", "/v1/key?x=1", mine.key)).json()["error"]["message"]
            assert told == "`x` is not known here; there are no parameters."

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/key"),
        ("GET", "/v1/generation"),
        ("GET", "/v1/organization/costs?start_time=0"),
        ("GET", "/v1/organization/usage/completions"),
        ("GET", "/v1/organization/usage/export?format=x"),
        ("GET", "/admin/keys"),
        ("POST", "/admin/keys"),
        ("POST", "/admin/accounts/a/topups"),
    ],
)
def test_without_billing_there_is_nothing_to_tell_whatever_was_asked(call: Any, method: str, path: str) -> None:
    answer = call(method, path)
    assert answer.status_code == 404
    assert "--billing" in answer.json()["error"]["message"]
