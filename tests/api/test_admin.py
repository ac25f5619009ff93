"""Keys, accounts and projects over HTTP: what the command line does, for admin keys and nobody else."""

import asyncio
import logging
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from metered import Metered, cost, metered
from schemathesis import checks

from ernie_serve.api.description import OPERATIONS, describe
from ernie_serve.billing.price_lists import set_prices
from ernie_serve.billing.prices import Prices

ADMIN_ROUTES = [each for each in OPERATIONS if each.path.startswith("/admin/")]


async def admin_of(server: Metered) -> str:
    return (await server.new_key("admin", name="root", account="root")).key


async def done(server: Metered, method: str, path: str, key: str, body: Any = None) -> Any:
    answer = await server.ask(method, path, key, **({} if body is None else {"json": body}))
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return answer.json()


def test_a_key_is_made_works_is_limited_and_ends(shop: Any, make_services: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> str:
        async with metered(shop, make_services) as server:
            admin = await admin_of(server)
            limits = {"requests_per_minute": 60, "monthly_limit_usd": "0.25"}
            asked = {"name": "laptop", "account": "acme", "project": "web", "credit_usd": "0.000001540", **limits}
            made = await done(server, "POST", "/admin/keys", admin, asked)
            key = made.pop("value")
            assert key.startswith(f"sk-{made['id']}-")
            assert made["redacted_value"] == f"sk-{made['id']}-…"
            wanted = {"name": "laptop", "account": "acme", "project": "web", "status": "active", "expires_at": None}
            wanted |= limits | {"monthly_limit_nano_usd": 250_000_000, "scopes": ["inference", "read-usage"]}
            assert wanted.items() <= made.items()
            assert cost("Hi", 5) == 1540
            await server.complete(key)
            poor = await server.ask("POST", "/v1/completions", key, json={"model": "ernie", "prompt": "Hi"})
            assert poor.status_code == 402

            change = {"requests_per_minute": None, "max_concurrent": 3}
            for asked in (change, {}):
                changed = await done(server, "POST", f"/admin/keys/sk-{made['id']}", admin, asked)
            assert changed["last_used_at"] is not None
            unchanged = {"last_used_at": None} | change
            assert changed | {"last_used_at": None} == made | unchanged
            assert (await done(server, "GET", f"/admin/keys/{made['id']}", admin)) == changed
            await done(server, "POST", f"/admin/accounts/{made['account_id']}/topups", admin, {"amount_usd": 1})
            await server.complete(key)
            ended = await done(server, "DELETE", f"/admin/keys/{made['id']}", admin)
            assert (ended["status"], ended["disabled_at"] is None) == ("disabled", False)
            assert (await server.ask("GET", "/v1/key", key)).status_code == 401
            again = await done(server, "DELETE", f"/admin/keys/{made['id']}", admin)
            assert again["disabled_at"] == ended["disabled_at"]
            for told in (made, changed, ended):
                assert key[20:] not in str(told)
            return key

    key = asyncio.run(scenario())
    for told in ("made a key", "limited the key", "booked 1 USD to the account", "disabled the key"):
        assert caplog.text.count(told) == 1  # though some are asked for twice
    assert key[20:] not in caplog.text


def test_credit_is_booked_once_for_a_reference_and_in_both_directions(
    shop: Any, make_services: Any, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        async with metered(shop, make_services) as server:
            admin = await admin_of(server)
            account = (await done(server, "POST", "/admin/keys", admin, {"name": "k", "account": "a"}))["account_id"]
            path = f"/admin/accounts/{account}/topups"
            for _ in range(2):
                told = await done(server, "POST", path, admin, {"amount_usd": "7.000000001", "reference": "invoice 7"})
                assert (told["balance_usd"], told["balance_nano_usd"]) == ("7.000000001", 7_000_000_001)
            await done(server, "POST", path, admin, {"amount_usd": 0})
            told = await done(server, "POST", path, admin, {"amount_usd": "-2", "kind": "adjust"})
            assert told["balance_usd"] == "5.000000001"
            for body, param in (
                ({"amount_usd": 0.5}, "amount_usd"),
                ({"amount_usd": True}, "amount_usd"),
                ({"amount_usd": "0.0000000001"}, "amount_usd"),
                ({"amount_usd": "1e3"}, "amount_usd"),
                ({"amount_usd": "-1"}, "amount_usd"),
                ({"amount_usd": "99999999999"}, "amount_usd"),
                ({}, "amount_usd"),
                ({"amount_usd": "1", "kind": "usage"}, "kind"),
                ({"amount_usd": "1", "currency": "eur"}, "currency"),
                ({"amount_usd": "1", "reference": "\x00"}, "reference"),
                ({"amount_usd": "8", "reference": "invoice 7"}, None),
                ({"amount_usd": "9223372036"}, None),
                ({"amount_usd": "-6", "kind": "adjust"}, None),
            ):
                refused = await server.ask("POST", path, admin, json=body)
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), body
                assert not refused.json()["error"]["message"].endswith(".."), body
            assert (await done(server, "GET", f"/admin/accounts/{account}", admin))["balance_usd"] == "5.000000001"
            used = await server.ask("POST", path, admin, json={"amount_usd": "8", "reference": "invoice 7"})
            told = "reference `invoice 7` was used for another booking, 7.000000001 USD as topup to the account a ("
            assert told in used.json()["error"]["message"]
            booked = [each for each in caplog.messages if "booked" in each]
            assert [each.split()[5] for each in booked] == ["7.000000001", "-2"]

    asyncio.run(scenario())


def test_the_price_of_a_request_is_found_by_its_version(shop: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with metered(shop, make_services) as server:
            admin, new = await admin_of(server), await server.new_key()
            answer = await server.complete(new.key)
            for nano in (7, 0):
                await server.meter.change(set_prices, "other", Prices(cached_nano=nano), now=9)
            version = (await server.get("/v1/generation", new.key, id=answer["id"]))["data"]["price_version"]
            every = await done(server, "GET", "/admin/prices", admin)
            assert [each["price_version"] for each in every["data"]] == [version, version + 1, version + 2]
            assert every["data"][1] == {
                "id": str(version + 1),
                "object": "price_list",
                "price_version": version + 1,
                "model": "other",
                "input_usd_per_million": "0.07",
                "input_nano_usd": 70,
                "cached_input_usd_per_million": "0.007",
                "cached_input_nano_usd": 7,
                "output_usd_per_million": "0.28",
                "output_nano_usd": 280,
                "valid_from": 9,
            }
            page = await done(server, "GET", f"/admin/prices?limit=1&after={version}", admin)
            assert (page["data"], page["has_more"]) == ([every["data"][1]], True)

    asyncio.run(scenario())


def test_bookings_are_listed_page_by_page(small_shop: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            admin = await admin_of(server)
            keys = [await server.new_key(account=name) for name in ("a", "b")]
            for index, new in enumerate(keys):
                await server.complete(new.key)
                path = f"/admin/accounts/{new.account_id}/topups"
                await done(server, "POST", path, admin, {"amount_usd": 1, "reference": f"invoice {index}"})
            await done(server, "POST", path, admin, {"amount_usd": "-0.5", "kind": "adjust"})
            every = await done(server, "GET", "/admin/bookings", admin)
            assert (every["has_more"], every["last_id"]) == (False, every["data"][-1]["id"])
            told = [(each["account"], each["kind"], each["amount_usd"], each["reference"]) for each in every["data"]]
            assert told == [
                ("root", "topup", "1", None),
                ("a", "topup", "1", None),
                ("b", "topup", "1", None),
                ("a", "topup", "1", "invoice 0"),
                ("b", "topup", "1", "invoice 1"),
                ("b", "adjust", "-0.5", None),
            ]
            first = await done(server, "GET", "/admin/bookings?limit=4", admin)
            rest = await done(server, "GET", f"/admin/bookings?limit=4&after={first['last_id']}", admin)
            assert (first["has_more"], first["data"] + rest["data"]) == (True, every["data"])
            of_b = await done(server, "GET", f"/admin/bookings?account_id={keys[1].account_id}", admin)
            assert of_b["data"] == [each for each in every["data"] if each["account"] == "b"]
            assert set(of_b["data"][0]) == {
                *("id", "object", "account_id", "account", "kind", "amount_usd", "amount_nano_usd", "reference"),
                "created_at",
            }
            for query in ("limit=0", "limit=1001", "after=x", "after=-1", "kind=topup"):
                assert (await server.ask("GET", f"/admin/bookings?{query}", admin)).status_code == 400

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": " "}, "name"),
        ({"name": "k", "account": "x\x00"}, "account"),
        ({"name": "k", "rpm": 5}, "rpm"),
        ({"name": "k", "requests_per_minute": 0}, "requests_per_minute"),
        ({"name": "k", "requests_per_minute": 2**63}, "requests_per_minute"),
        ({"name": "k", "tokens_per_minute": 2**64}, "tokens_per_minute"),
        ({"name": "k", "monthly_limit_usd": "-1"}, "monthly_limit_usd"),
        ({"name": "k", "credit_usd": "-1"}, "credit_usd"),
        ({"name": "k", "credit_usd": 0.1}, "credit_usd"),
        ({"name": "k", "scopes": []}, "scopes"),
        ({"name": "k", "scopes": ["root"]}, "scopes[0]"),
        ({"name": "k", "expires_at": 1_000_000_000}, "expires_at"),
        ({"name": "k", "expires_at": "tomorrow"}, "expires_at"),
        ({"name": "k", "expires_at": 253_402_300_800}, "expires_at"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused_by_name(
    small_shop: Any, make_services: Any, body: Any, param: str | None
) -> None:
    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            admin = await admin_of(server)
            refused = await server.ask("POST", "/admin/keys", admin, json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
            assert len((await done(server, "GET", "/admin/keys", admin))["data"]) == 1

    asyncio.run(scenario())


def test_lists_are_read_a_page_at_a_time(shop: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with metered(shop, make_services) as server:
            admin = await admin_of(server)
            keys = [await server.new_key(account=f"of {index % 3}", name=str(index)) for index in range(7)]

            async def whole(path: str, **query: Any) -> list[Any]:
                seen: list[Any] = []
                page = await server.get(path, admin, limit=2, **query)
                seen += page["data"]
                while page["has_more"]:
                    assert len(page["data"]) == 2
                    page = await server.get(path, admin, limit=2, after=page["last_id"], **query)
                    seen += page["data"]
                return seen

            listed = await whole("/admin/keys")
            assert len(listed) == 8
            assert {each["id"] for each in listed} > {each.key_id for each in keys}
            mine = await whole("/admin/keys", account_id=keys[0].account_id)
            assert {each["name"] for each in mine} == {"0", "3", "6"}
            assert len(await whole("/admin/keys", project_id=keys[1].project_id)) == 2
            assert [each["name"] for each in await whole("/admin/accounts")] != []
            assert {each["name"] for each in await whole("/admin/accounts")} == {"root", "of 0", "of 1", "of 2"}
            projects = await server.get("/admin/projects", admin, account_id=keys[0].account_id)
            assert [each["id"] for each in projects["data"]] == [keys[0].project_id]
            empty = await server.get("/admin/keys", admin, account_id="nobody")
            assert (empty["data"], empty["has_more"], empty["last_id"]) == ([], False, None)
            for query in ("limit=0", "limit=1001", "offset=3"):
                assert (await server.ask("GET", f"/admin/keys?{query}", admin)).status_code == 400

    asyncio.run(scenario())


def test_a_closed_account_and_a_limited_project_bind_their_keys(small_shop: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            admin, new = await admin_of(server), await server.new_key(account="a")
            project = await done(
                server, "POST", f"/admin/projects/{new.project_id}", admin, {"monthly_limit_usd": "0.000001"}
            )
            assert project["monthly_limit_nano_usd"] == 1000
            poor = await server.ask("POST", "/v1/completions", new.key, json={"model": "ernie", "prompt": "Hi"})
            assert poor.status_code == 402
            await done(server, "POST", f"/admin/projects/{new.project_id}", admin, {"monthly_limit_usd": None})
            await server.complete(new.key)
            for status, code in (("disabled", 401), ("active", 200)):
                told = await done(server, "POST", f"/admin/accounts/{new.account_id}", admin, {"status": status})
                assert told["status"] == status
                assert (await server.ask("GET", "/v1/key", new.key)).status_code == code

    asyncio.run(scenario())


def test_what_is_not_there_is_a_404(small_shop: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            admin = await admin_of(server)
            for method, path, body in (
                ("GET", "/admin/keys/none", None),
                ("POST", "/admin/keys/none", {}),
                ("DELETE", "/admin/keys/none", None),
                ("GET", "/admin/accounts/none", None),
                ("POST", "/admin/accounts/none", {"status": "active"}),
                ("POST", "/admin/accounts/none/topups", {"amount_usd": 1}),
                ("POST", "/admin/projects/none", {"monthly_limit_usd": None}),
            ):
                answer = await server.ask(method, path, admin, **({} if body is None else {"json": body}))
                assert answer.status_code == 404, path
                assert "`none`" in answer.json()["error"]["message"]

    asyncio.run(scenario())


def test_every_admin_route_is_for_admin_keys(small_shop: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            new = await server.new_key("inference", "read-usage")
            for each in ADMIN_ROUTES:
                for path in (each.path, f"{each.path}/", each.path.replace("{", "").replace("}", "")):
                    answer = await server.ask(each.method, path, new.key, json={})
                    assert answer.status_code == 403, path
                    assert (await server.ask(each.method, path, None)).status_code == 401
            for path in ("//admin/keys", "/ADMIN/keys", "/admin%2fkeys", "/admin", "/administrator"):
                assert (await server.ask("GET", path, new.key)).status_code in (403, 404)
            assert len(await server.meter.report(lambda connection: connection.exec_driver_sql(KEYS).all())) == 1

    asyncio.run(scenario())


KEYS = "SELECT public_id FROM api_key"


def test_nothing_that_is_described_makes_a_server_with_billing_fail(
    small_shop: Any, make_services: Any, serve: Any
) -> None:
    paths = [each for each in OPERATIONS if each.query or each.path.startswith(("/admin/", "/v1/key"))]
    allowed = [checks.not_a_server_error, checks.status_code_conformance, checks.response_schema_conformance]

    def fuzz(url: str, key: str, ids: dict[str, str]) -> None:
        schema = schemathesis.openapi.from_dict(describe())
        for each in paths:
            strategy = schema[each.path][each.method.upper()].as_strategy()

            @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(case=strategy)
            def validate(case: Any) -> None:
                for name in case.path_parameters or {}:
                    case.path_parameters[name] = ids[name]
                headers = {"authorization": f"Bearer {key}"}
                case.call_and_validate(base_url=url, headers=headers, checks=allowed)

            validate()

    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            admin, new = await admin_of(server), await server.new_key()
            ids = {"key_id": new.key_id, "account_id": new.account_id, "project_id": new.project_id}
            await asyncio.to_thread(fuzz, serve(server.app), admin, ids)

    asyncio.run(scenario())
