"""Usage and costs by time as OpenAI tells them, and exports: everything there is, to those who may see it."""

import asyncio
import csv
import io
import json
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from jsonschema import Draft202012Validator
from metered import DAY, Metered, cost, exactly, metered
from sqlalchemy import Connection, update

from ernie_serve.billing.reports import DAY as REPORT_DAY
from ernie_serve.billing.schema import usage_day, usage_event
from ernie_serve.errors import StoreUnavailable

USAGE, COSTS, EXPORT = (f"/v1/organization/{name}" for name in ("usage/completions", "costs", "usage/export"))
ONE = cost("Hi", 5)
SPEC = Path(__file__).resolve().parents[3] / "shared" / "reference" / "openai_spec_subset.json"


def today() -> int:
    now = int(time.time())
    return now - now % DAY


def days_back(connection: Connection, key_id: str, days: int) -> None:
    """Make a key's use look older."""
    for table, column in ((usage_event, usage_event.c.created), (usage_day, usage_day.c.day)):
        mine = update(table).where(table.c.key_id == key_id)
        connection.execute(mine.values({column: column - days * REPORT_DAY}))


async def spend(server: Metered) -> dict[str, Any]:
    """Keys of one account's two projects and of another account, with 3, 2 and 1 requests."""
    keys = {
        "a": await server.new_key(account="acme"),
        "b": await server.new_key(account="acme", project="other"),
        "c": await server.new_key(account="else"),
    }
    for name, count in (("a", 3), ("b", 2), ("c", 1)):
        for _ in range(count):
            await server.complete(keys[name].key)
    return keys


def all_results(page: Any) -> list[Any]:
    return [result for bucket in page["data"] for result in bucket["results"]]


def test_a_key_sees_its_project_and_an_admin_everything(shop: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with metered(shop, make_services) as server:
            keys = await spend(server)
            admin = (await server.new_key("admin", account="root")).key
            for name, count in (("a", 3), ("b", 2), ("c", 1)):
                page = await server.get(USAGE, keys[name].key, start_time=today())
                (result,) = all_results(page)
                assert (result["num_model_requests"], result["input_tokens"], result["output_tokens"]) == (
                    count,
                    2 * count,
                    5 * count,
                )
                (result,) = all_results(await server.get(COSTS, keys[name].key, start_time=today()))
                assert result["amount"] == {"value": Decimal(count * ONE) / 10**9, "currency": "usd"}
                assert result["cost_nano_usd"] == count * ONE
            groups = {"group_by[]": ["project_id", "api_key_id", "model"]}
            found = all_results(await server.get(USAGE, admin, start_time=today(), **groups))
            assert {(each["project_id"], each["api_key_id"], each["num_model_requests"]) for each in found} == {
                (keys[name].project_id, keys[name].key_id, count) for name, count in (("a", 3), ("b", 2), ("c", 1))
            }
            assert {each["model"] for each in found} == {"baidu/ernie"}
            for narrow, count in (
                ({"project_ids": keys["b"].project_id}, 2),
                ({"api_key_ids[]": [f"sk-{keys['a'].key_id}", keys["c"].key_id]}, 4),
                ({"models": "baidu/ernie"}, 6),
                ({"models": "another"}, None),
            ):
                found = all_results(await server.get(USAGE, admin, start_time=today(), **narrow))
                assert [each["num_model_requests"] for each in found] == ([] if count is None else [count])

    asyncio.run(scenario())


def test_what_is_somebody_elses_is_refused_or_empty(small_shop: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            keys = await spend(server)
            for path in (USAGE, COSTS, EXPORT):
                theirs = {"start_time": 0, "project_ids": [keys["a"].project_id, keys["b"].project_id]}
                refused = await server.ask("GET", path, keys["a"].key, params=theirs)
                assert (refused.status_code, refused.json()["error"]["param"]) == (403, "project_ids")
            narrow = {"start_time": today(), "api_key_ids": keys["b"].key_id}
            assert all_results(await server.get(USAGE, keys["a"].key, **narrow)) == []
            exported = await server.ask("GET", EXPORT, keys["a"].key, params={"start_time": 0})
            assert len(exported.text.splitlines()) == 3
            inference = await server.new_key("inference", account="acme")
            for path in (USAGE, COSTS, EXPORT, "/v1/key", "/v1/generation"):
                assert (await server.ask("GET", path, inference.key)).status_code == 403

    asyncio.run(scenario())


@pytest.mark.parametrize(("path", "width"), [(USAGE, "1d"), (USAGE, "1h"), (COSTS, "1d")])
def test_pages_are_the_whole(small_shop: Any, make_services: Any, path: str, width: str) -> None:
    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            keys = await spend(server)
            await server.meter.change(days_back, keys["a"].key_id, 2)
            admin = (await server.new_key("admin")).key
            query = {"start_time": today() - 2 * DAY, "end_time": today() + DAY, "bucket_width": width, "limit": 2}
            seen: list[Any] = []
            page = await server.get(path, admin, **query)
            seen += page["data"]
            while page["has_more"]:
                page = await server.get(path, admin, **query, page=page["next_page"])
                seen += page["data"]
            assert page["next_page"] is None
            starts = [bucket["start_time"] for bucket in seen]
            assert starts == list(range(today() - 2 * DAY, today() + DAY, DAY if width == "1d" else 3600))
            assert [bucket["end_time"] for bucket in seen[:-1]] == starts[1:]
            assert sum(each["cost_nano_usd"] for each in all_results({"data": seen})) == 6 * ONE

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "start_time"),
        ("start_time=soon", "start_time"),
        ("start_time=-1", "start_time"),
        ("start_time=99999999999999", "start_time"),
        ("start_time=9&end_time=9", "start_time"),
        ("start_time=0&start_time=1", "start_time"),
        ("start_time=0&bucket_width=1y", "bucket_width"),
        ("start_time=0&group_by=user_id", "group_by[0]"),
        ("start_time=0&group_by=model&group_by=model", "group_by"),
        ("start_time=0&limit=0", "limit"),
        ("start_time=0&limit=1000", "limit"),
        ("start_time=0&page=7", "page"),
        ("start_time=0&page=page_99999999999999", "page"),
        ("start_time=0&batch=true", "batch"),
        ("start_time=0&project_id=proj_1", "project_id"),
        ("start_time=0&" + "&".join(["models=m"] * 101), "models"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(small_shop: Any, make_services: Any, query: str, param: str) -> None:
    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            answer = await server.ask("GET", f"{USAGE}?{query}", (await server.new_key()).key)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == param

    asyncio.run(scenario())


def test_pages_are_as_openai_describes_them(small_shop: Any, make_services: Any) -> None:
    if not SPEC.is_file():
        pytest.skip(f"no copy of OpenAI's description at {SPEC}")
    spec = json.loads(SPEC.read_text())

    def check(value: Any, name: str) -> None:
        Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": spec["components"]}).validate(value)

    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            await spend(server)
            admin = (await server.new_key("admin")).key
            for path, result in ((USAGE, "UsageCompletionsResult"), (COSTS, "CostsResult")):
                answer = await server.ask("GET", path, admin, params={"start_time": today(), "group_by": "project_id"})
                page = json.loads(answer.text)
                check(page, "UsageResponse")
                assert page["data"][0]["results"]
                for each in page["data"][0]["results"]:
                    check(each, result)

    asyncio.run(scenario())


def test_openais_own_client_reads_usage_and_costs(small_shop: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            keys = await spend(server)
            admin = (await server.new_key("admin")).key
            transport = httpx.ASGITransport(app=server.app)
            async with openai.AsyncOpenAI(
                admin_api_key=admin,
                api_key="none",
                base_url="http://test/v1",
                http_client=httpx.AsyncClient(transport=transport),
            ) as client:
                usage = client.admin.organization.usage
                page = await usage.completions(
                    start_time=today(), group_by=["project_id"], api_key_ids=[keys["a"].key_id, keys["b"].key_id]
                )
                counts = {each.project_id: each.num_model_requests for each in page.data[0].results}  # type: ignore[union-attr]
                assert counts == {keys["a"].project_id: 3, keys["b"].project_id: 2}
                costs = await usage.costs(start_time=today(), group_by=["line_item"])
                (result,) = costs.data[0].results
                assert (result.object, result.line_item) == ("organization.costs.result", "baidu/ernie")  # type: ignore[union-attr]

    asyncio.run(scenario())


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_an_export_is_every_request(shop: Any, make_services: Any, form: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("ernie_serve.billing.reports.EXPORT_PAGE", 2)

    async def scenario() -> None:
        async with metered(shop, make_services) as server:
            keys = await spend(server)
            admin = (await server.new_key("admin")).key
            query = {"start_time": today(), "format": form}
            answer = await server.ask("GET", EXPORT, admin, params=query)
            assert f"usage.{form}" in answer.headers["content-disposition"]
            assert answer.headers["content-type"].startswith("text/csv" if form == "csv" else "application/x-ndjson")
            text = answer.text
            rows = [*csv.DictReader(io.StringIO(text))] if form == "csv" else [*map(json.loads, text.splitlines())]
            assert len({row["request_id"] for row in rows}) == len(rows) == 6
            assert sum(int(row["cost_nano"]) for row in rows) == 6 * ONE
            assert {row["cost_usd"] for row in rows} == {f"0.{ONE:09d}".rstrip("0")}
            narrow = await server.ask("GET", EXPORT, admin, params=query | {"api_key_ids": keys["c"].key_id})
            assert len(narrow.text.splitlines()) == 1 + (form == "csv")
            head = await server.ask("HEAD", EXPORT, admin, params=query)
            assert (head.status_code, head.content) == (200, b"")
            nothing = await server.ask("GET", EXPORT, admin, params={"start_time": 0, "end_time": 1, "format": form})
            assert (nothing.status_code, len(nothing.text.splitlines())) == (200, int(form == "csv"))

    asyncio.run(scenario())


def test_an_export_from_a_store_that_is_away_is_a_503_or_is_cut(
    small_shop: Any, make_services: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("ernie_serve.billing.reports.EXPORT_PAGE", 1)

    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            await spend(server)
            admin = (await server.new_key("admin")).key
            read, left = server.meter._store._read, [0]

            def failing(do: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise StoreUnavailable("away")
                return read(do)

            await server.meter.authenticate(admin)
            with monkeypatch.context() as patch:
                patch.setattr(server.meter._store, "_read", failing)
                answer = await server.ask("GET", EXPORT, admin, params={"start_time": 0})
                assert answer.status_code == 503
                assert answer.headers["retry-after"]
                left[0] = 3
                sent = await messages(server.app, f"{EXPORT}?start_time=0", admin)
                assert sent[0]["status"] == 200
                assert sum(message["body"].count(b"\n") for message in sent[1:]) == 3
                assert all(message["more_body"] for message in sent[1:])  # never ended: the client sees a cut answer

    asyncio.run(scenario())


async def messages(app: Any, url: str, key: str) -> list[Any]:
    """What an application sends to the server, as it is."""
    path, _, query = url.partition("?")
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": query.encode(),
        "headers": [(b"authorization", f"Bearer {key}".encode())],
        "asgi": {"spec_version": "2.4"},
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def test_money_in_a_report_is_exact(small_shop: Any, make_services: Any) -> None:
    def inflate(connection: Connection) -> None:
        connection.execute(update(usage_day).values(cost_nano=9_007_199_254_740_993))

    async def scenario() -> None:
        async with metered(small_shop, make_services) as server:
            new = await server.new_key()
            await server.complete(new.key)
            before = await server.meter.report(
                lambda connection: connection.execute(usage_day.select()).one().cost_nano
            )
            await server.meter.change(inflate)
            answer = await server.ask("GET", COSTS, new.key, params={"start_time": today()})
            assert '"value":9007199.254740993' in answer.text
            assert all_results(exactly(answer))[0]["amount"]["value"] == Decimal("9007199.254740993")
            await server.meter.change(lambda connection: connection.execute(update(usage_day).values(cost_nano=before)))

    asyncio.run(scenario())
