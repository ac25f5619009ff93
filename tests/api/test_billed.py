"""The request path of somebody who pays: held before, charged once, and charged before the end is told."""

import asyncio
import json
import random
import re
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from stores import Shop

from ernie_serve.api.app import create_app
from ernie_serve.api.response_file import ResponseFile
from ernie_serve.billing.keys import Caller, KeyLimits
from ernie_serve.billing.meter import Charge, Charging, Order
from ernie_serve.billing.money import format_usd
from ernie_serve.billing.paid import PaidMeter
from ernie_serve.billing.prices import Prices
from ernie_serve.billing.reports import Scope, UsageRow, list_usage
from ernie_serve.errors import EngineUnavailable, RequestConflict
from ernie_serve.messages import EngineOutput, EngineRequest

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "ernie", "prompt": "Hi"},
    CHAT: {"model": "ernie", "messages": [{"role": "user", "content": "Hi"}]},
    RESPONSES: {"model": "ernie", "input": "Hi"},
}
TOKENIZE = {"prompt": "Hi"}
USAGE = {"stream_options": {"include_usage": True}}


@dataclass
class Counter:
    """A server that charges, and a customer with a key."""

    app: FastAPI
    meter: PaidMeter
    shop: Shop
    key: str
    caller: Caller
    post_to: Callable[..., Awaitable[Any]]

    async def post(self, path: str = COMPLETIONS, key: str | None = None, **given: Any) -> Any:
        """Ask with these fields changed; `headers`, `leave_after`, `gone` and `on_send` are the client's."""
        how = {name: given.pop(name) for name in ("headers", "leave_after", "gone", "on_send") if name in given}
        return await self.post_to(self.app, path, {**BODIES.get(path, TOKENIZE), **given}, key or self.key, **how)

    async def rows(self) -> list[UsageRow]:
        return await self.meter.report(list_usage, Scope(), start=0, end=2**40, limit=10_000)

    async def row(self) -> UsageRow:
        (row,) = await self.rows()
        return row

    async def balance(self) -> int:
        """What is left; nothing may be held any more."""
        account = await self.shop.account(self.meter, self.caller)
        assert account.reserved_nano == 0
        return account.balance_nano


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # what is waited for has no event of its own
        await asyncio.sleep(0)


@pytest.fixture
def open_counter(make_services: Any, post: Any) -> Callable[..., Any]:
    @asynccontextmanager
    async def opened(
        shop: Shop, credit_nano: int = 10**9, *, prices: Prices | None = None, key: Any = None, **changes: Any
    ) -> AsyncIterator[Counter]:
        async with shop.open(prices or Prices()) as meter:
            app = create_app(make_services(meter=meter, **changes))
            made = (await shop.new_key(meter, credit_nano, **(key or {}))).key
            yield Counter(app, meter, shop, made, await meter.authenticate(made), post)

    return opened


@pytest.mark.parametrize("stream", [False, True])
def test_a_balance_for_seventeen_answers_exactly_seventeen_of_two_hundred(
    shop: Shop, open_counter: Any, engine: Any, stream: bool
) -> None:
    cost = 2 * 70 + 16 * 280
    engine.reply = "x" * 100

    async def scenario() -> None:
        async with open_counter(shop, 17 * cost) as counter:
            heard = await asyncio.gather(*(counter.post(max_tokens=16, stream=stream) for _ in range(200)))
            assert [each.status for each in heard].count(200) == 17
            assert [each.status for each in heard].count(402) == 183
            assert len(engine.requests) == 17
            assert await counter.balance() == 0
            assert len(await counter.rows()) == 17

    asyncio.run(scenario())


def test_what_cannot_be_paid_is_told_both_numbers_and_asks_the_engine_nothing(
    small_shop: Shop, open_counter: Any, engine: Any
) -> None:
    async def scenario() -> None:
        async with open_counter(small_shop, 2 * 70 + 40 * 280) as counter:
            fields = ((CHAT, "max_completion_tokens"), (RESPONSES, "max_output_tokens"))
            for path, field in ((COMPLETIONS, "max_tokens"), (CHAT, "max_tokens"), *fields):
                for stream in (False, True):
                    heard = await counter.post(path, stream=stream, **{field: 100})
                    assert heard.status == 402
                    error = heard.error()
                    assert (error["code"], error["param"]) == ("insufficient_quota", field)
                    told = rf"`{field}`: you requested up to 100 tokens, but can only afford \d\d\b"
                    assert re.search(told, error["message"])
            assert engine.requests == []
            assert await counter.rows() == []
            assert (await counter.post(max_tokens=40)).status == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_lease_is_extended_until_it_cannot_be_and_the_answer_says_so(
    small_shop: Shop, open_counter: Any, engine: Any, path: str, stream: bool
) -> None:
    engine.reply, engine.step = "y" * 5000, 7

    async def scenario() -> None:
        async with open_counter(small_shop, 20 * 70 + 1500 * 280, max_model_len=10_000) as counter:
            heard = await counter.post(path, stream=stream)
            row = await counter.row()
            assert (row.prompt, row.completion, row.finish_reason, row.status) == (20, 1500, "length", "ok")
            assert await counter.balance() == 0
            last = heard.chunks()[-1] if stream else heard.json()
            if path == CHAT:
                assert last["choices"][0]["finish_reason"] == "length"
                assert last["choices"][0]["credit_exhausted"] is True
            else:
                told = last["response"] if stream else last
                assert told["status"] == "incomplete"
                assert told["incomplete_details"] == {"reason": "max_output_tokens", "credit_exhausted": True}
            assert heard.body.count(b"credit_exhausted") == 1

    asyncio.run(scenario())


def test_a_lease_that_can_be_extended_is_not_noticed(small_shop: Shop, open_counter: Any, engine: Any) -> None:
    engine.reply, engine.step = "y" * 5000, 7

    async def scenario() -> None:
        async with open_counter(small_shop, max_model_len=10_000) as counter:
            heard = await counter.post(CHAT, stream=True)
            assert b"credit_exhausted" not in heard.body
            assert (await counter.row()).completion == 5001  # the stop token as well

    asyncio.run(scenario())


def test_choices_share_a_lease_and_end_together(small_shop: Shop, open_counter: Any, engine: Any) -> None:
    engine.reply, engine.step = "x" * 5000, 3

    async def scenario() -> None:
        credit = 20 * 70 + 4000 * 280
        async with open_counter(small_shop, credit, max_model_len=10_000) as counter:
            heard = await counter.post(CHAT, n=3)
            row = await counter.row()
            assert (row.completion, row.prompt) == (4000, 20)
            assert sum(len(each["message"]["content"]) for each in heard.json()["choices"]) == 4000
            assert [each["credit_exhausted"] for each in heard.json()["choices"]] == [True] * 3

    asyncio.run(scenario())


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_usage_tells_the_cost_of_the_ledger_to_the_last_digit(
    small_shop: Shop, open_counter: Any, path: str, stream: bool
) -> None:
    async def scenario() -> None:
        async with open_counter(small_shop, prices=Prices(input_nano=1, output_nano=7)) as counter:
            options = {} if path == RESPONSES or not stream else USAGE
            heard = await counter.post(path, stream=stream, **options)
            row = await counter.row()
            assert row.cost_nano == row.prompt + 7 * row.completion == await small_cost(counter)
            last = heard.chunks()[-1] if stream else heard.json()
            usage = (last["response"] if path == RESPONSES and stream else last)["usage"]
            assert usage["cost_nano_usd"] == row.cost_nano
            assert re.findall(rb'"cost":([^,}]*)', heard.body) == [format_usd(row.cost_nano).encode()]
            names = ("input_tokens", "output_tokens") if path == RESPONSES else ("prompt_tokens", "completion_tokens")
            assert [usage[name] for name in names] == [row.prompt, row.completion]

    async def small_cost(counter: Counter) -> int:
        return 10**9 - await counter.balance()

    asyncio.run(scenario())


@pytest.mark.parametrize("path", BODIES)
def test_without_billing_there_is_no_cost(call: Any, path: str) -> None:
    assert "cost" not in call("POST", path, json=BODIES[path]).json()["usage"]


def test_without_billing_nothing_is_kept_for_an_idempotency_key(make_services: Any, post: Any) -> None:
    services = make_services()

    async def scenario() -> None:
        heard = await post(create_app(services), COMPLETIONS, BODIES[COMPLETIONS], **idempotent("a"))
        assert heard.status == 200
        with pytest.raises(RequestConflict, match="not kept"):
            await services.replays.get(json.loads(heard.body)["id"])

    asyncio.run(scenario())


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_the_charge_is_written_before_the_end_is_told(
    small_shop: Shop, open_counter: Any, path: str, stream: bool, n: int
) -> None:
    if path == RESPONSES and n > 1:
        return
    other = sqlite3.connect(small_shop.url.removeprefix("sqlite:///"))
    written: list[tuple[int, bytes]] = []

    def look(message: dict[str, Any]) -> None:
        (count,) = other.execute("SELECT count(*) FROM usage_event").fetchone()
        written.append((count, message.get("body", b"")))

    async def scenario() -> None:
        async with open_counter(small_shop) as counter:
            choices = {} if path == RESPONSES else {"n": n}
            assert (await counter.post(path, stream=stream, on_send=look, **choices)).status == 200

    asyncio.run(scenario())
    other.close()
    if not stream:
        assert {count for count, _ in written} == {1}
        return
    ends = [index for index, (_, body) in enumerate(written) if END.search(body)]
    before = [count for count, _ in written[: ends[0]]]
    assert before[:-1] == [0] * (ends[0] - 1)  # the last text may go while it is written
    assert written[ends[-1]][0] == 1
    assert b"response.completed" in written[ends[-1]][1] or b"[DONE]" in written[ends[-1]][1]
    assert len(ends) == n


@pytest.mark.parametrize("path", BODIES)
def test_the_last_text_of_a_stream_does_not_wait_for_its_charge(
    small_shop: Shop, open_counter: Any, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    told: list[bytes] = []

    async def scenario() -> None:
        released = asyncio.Event()
        async with open_counter(small_shop) as counter:
            settle = counter.meter.settle

            async def pass_on(charging: Charging, later: Charging) -> None:
                await released.wait()
                later.end(await charging)

            def settle_later(*args: Any, **kwargs: Any) -> Charging:
                later = Charging()
                passing.append(asyncio.ensure_future(pass_on(settle(*args, **kwargs), later)))
                return later

            passing: list[asyncio.Future[None]] = []
            monkeypatch.setattr(counter.meter, "settle", settle_later)
            look = counter.post(path, stream=True, on_send=lambda message: told.append(message.get("body", b"")))
            asking = asyncio.ensure_future(look)
            await until(lambda: b'"!"' in b"".join(told) and bool(passing))
            assert not END.search(b"".join(told))
            released.set()
            await asking
            assert END.search(b"".join(told))

    asyncio.run(asyncio.wait_for(scenario(), 30))


END = re.compile(rb'"finish_reason":"|response\.completed')


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("breakage", ["error", EngineUnavailable("It ended."), RuntimeError("secret")])
def test_what_we_fail_costs_nothing(
    small_shop: Shop, open_counter: Any, engine: Any, stream: bool, breakage: Any
) -> None:
    engine.break_after, engine.breakage = 3, breakage

    async def scenario() -> None:
        async with open_counter(small_shop) as counter:
            heard = await counter.post(stream=stream)
            assert heard.status == (200 if stream else 503 if isinstance(breakage, EngineUnavailable) else 500)
            row = await counter.row()
            assert (row.status, row.cost_nano) == ("failed", 0)
            assert await counter.balance() == 10**9

    asyncio.run(scenario())


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_what_was_told_before_its_own_constraints_ended_it_is_paid(
    small_shop: Shop, open_counter: Any, engine: Any, path: str, stream: bool
) -> None:
    engine.break_after, engine.error_code = 3, "no_token_left"

    async def scenario() -> None:
        async with open_counter(small_shop) as counter:
            heard = await counter.post(path, stream=stream)
            assert heard.status == (200 if stream else 400)
            assert b"leave no token" in heard.body
            row = await counter.row()
            assert (row.status, row.completion) == ("cancelled" if stream else "failed", 3)
            assert (row.cost_nano > 0) is stream

    asyncio.run(scenario())


def test_what_was_held_back_when_its_own_constraints_ended_it_costs_nothing(
    small_shop: Shop, open_counter: Any, engine: Any
) -> None:
    engine.break_after, engine.error_code = 3, "no_token_left"

    async def scenario() -> None:
        async with open_counter(small_shop) as counter:
            assert (await counter.post(stream=True, stop="Hello, world")).status == 400
            row = await counter.row()
            assert (row.status, row.completion, row.cost_nano) == ("failed", 3, 0)

    asyncio.run(scenario())


def test_what_is_refused_costs_nothing_and_holds_nothing(small_shop: Shop, open_counter: Any, engine: Any) -> None:
    async def scenario() -> None:
        async with open_counter(small_shop) as counter:
            wrong: list[dict[str, Any]] = [{"model": "gpt"}, {"temperature": 9}, {"prompt": "x" * 300}, {"suffix": "a"}]
            assert [(await counter.post(**fields)).status for fields in wrong] == [404, 400, 400, 400]
            engine.state = "loading"
            assert (await counter.post()).status == 503
            assert await counter.rows() == []
            assert await counter.balance() == 10**9

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("hang_after", "n"), [(0, 1), (3, 1), (4, 2)])
def test_a_client_that_leaves_pays_what_was_computed(
    small_shop: Shop, open_counter: Any, engine: Any, stream: bool, hang_after: int, n: int
) -> None:
    engine.hang_after = hang_after

    async def scenario() -> None:
        async with open_counter(small_shop) as counter:
            gone = asyncio.Event()
            asking = asyncio.ensure_future(counter.post(stream=stream, n=n, gone=gone))
            await until(
                lambda: len(engine.running) == n and engine.num_made == n * hang_after and engine.begun.is_set()
            )
            gone.set()
            await asking
            row = await counter.row()
            made = n * hang_after
            assert (row.prompt, row.completion, row.status) == (2 if made else 0, made, "cancelled")
            assert 10**9 - await counter.balance() == row.cost_nano == (140 + 280 * made if made else 0)
            assert engine.running == set()

    asyncio.run(scenario())


def test_a_long_prompt_is_charged_from_its_first_part_on(small_shop: Shop, open_counter: Any, engine: Any) -> None:
    class Prefilling:
        """Has computed a part of the prompt, and is at it."""

        state, info, running = "ready", None, False

        async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
            yield EngineOutput(request_id=request.request_id)
            self.running = True
            await asyncio.Event().wait()

    prefilling = Prefilling()

    async def scenario() -> None:
        async with open_counter(small_shop, engine=prefilling) as counter:
            gone = asyncio.Event()
            asking = asyncio.ensure_future(counter.post(gone=gone))
            await until(lambda: prefilling.running)
            gone.set()
            await asking
            row = await counter.row()
            assert (row.prompt, row.completion, row.cost_nano, row.ttft_us) == (2, 0, 140, None)

    asyncio.run(scenario())


def test_a_server_that_goes_down_charges_nobody(small_shop: Shop, open_counter: Any, engine: Any) -> None:
    engine.hang_after = 3

    async def scenario() -> None:
        async with open_counter(small_shop) as counter:
            for stream in (False, True):
                engine.begun.clear()
                asking = asyncio.ensure_future(counter.post(stream=stream))
                await until(lambda: engine.begun.is_set())
                asking.cancel("Task cancelled, timeout graceful shutdown exceeded")
                with pytest.raises(asyncio.CancelledError):
                    await asking
            assert [(row.status, row.cost_nano) for row in await counter.rows()] == [("failed", 0)] * 2
            assert await counter.balance() == 10**9

    asyncio.run(scenario())


def test_each_kind_of_token_has_its_price(small_shop: Shop, open_counter: Any, engine: Any, make_services: Any) -> None:
    async def scenario() -> None:
        async with open_counter(small_shop, prices=Prices(cached_nano=7)) as counter:
            engine.num_cached = 1
            costs: list[tuple[dict[str, Any], int]] = [
                ({"max_tokens": 3}, 70 + 7 + 3 * 280),
                ({"max_tokens": 3, "n": 2}, 70 + 7 + 6 * 280),  # the prompt once
                ({"max_tokens": 3, "best_of": 3}, 70 + 7 + 9 * 280),
                ({"max_tokens": 2, "prompt": ["ab", "cd"]}, 2 * (70 + 7) + 4 * 280),
                ({"max_tokens": 0, "echo": True, "logprobs": 1}, 70 + 7),  # the prompt is computed, nothing is made
                ({"max_tokens": 0}, 0),  # nothing is computed
            ]
            for fields, cost in costs:
                before = await counter.balance()
                heard = await counter.post(**fields)
                assert heard.json()["usage"]["cost_nano_usd"] == cost == before - await counter.balance(), fields

    asyncio.run(scenario())


def test_reasoning_is_paid_as_output(
    small_shop: Shop, open_counter: Any, engine: Any, tagged: Any, thinking_services: Any
) -> None:
    engine.reply = tagged("Hm.\n</think>\n\n\nYes.")

    async def scenario() -> None:
        changes = {"template": thinking_services.template, "format": thinking_services.format, "max_model_len": 4096}
        async with open_counter(small_shop, **changes) as counter:
            await counter.post(CHAT)
            row = await counter.row()
            assert 0 < row.reasoning < row.completion
            assert row.cost_nano == 70 * row.prompt + 280 * row.completion

    asyncio.run(scenario())


def test_who_asks_too_fast_is_told_when_to_come_back(small_shop: Shop, open_counter: Any, engine: Any) -> None:
    async def scenario() -> None:
        limits = KeyLimits(requests_per_minute=2, tokens_per_minute=1000)
        async with open_counter(small_shop, key={"limits": limits}) as counter:
            heard = [await counter.post(max_tokens=16, stream=stream) for stream in (False, True, False)]
            assert [each.status for each in heard] == [200, 200, 429]
            refused = heard[-1]
            assert refused.error()["code"] == "rate_limit_exceeded"
            assert refused.headers["retry-after"] == "30"
            assert len(engine.requests) == 2
            small_shop.clock.move(30)
            heard += [
                await counter.post(max_tokens=16),
                await counter.post(model="gpt"),
                await counter.post("/tokenize"),
            ]
            assert [each.status for each in heard[3:]] == [200, 404, 200]
            assert [each.headers["x-ratelimit-remaining-requests"] for each in heard] == list("100000")
            for each in heard:
                told = {name for name in each.headers if name.startswith("x-ratelimit-")}
                assert told == {
                    f"x-ratelimit-{field}-{of}"
                    for field in ("limit", "remaining", "reset")
                    for of in ("requests", "tokens")
                }
                assert each.headers["x-ratelimit-limit-tokens"] == "1000"
            assert heard[0].headers["x-ratelimit-remaining-tokens"] == "984"  # 2 + 14 of the 18 that were held

    asyncio.run(scenario())


def test_only_so_many_run_at_once(small_shop: Shop, open_counter: Any, engine: Any) -> None:
    engine.hang_after = 1

    async def scenario() -> None:
        async with open_counter(small_shop, key={"limits": KeyLimits(concurrent=1)}) as counter:
            gone = asyncio.Event()
            running = asyncio.ensure_future(counter.post(stream=True, gone=gone))
            await until(lambda: engine.begun.is_set())
            refused = await counter.post()
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            gone.set()
            await running
            engine.hang_after = None
            assert (await counter.post()).status == 200

    asyncio.run(scenario())


def test_a_disabled_key_is_refused_within_five_seconds(small_shop: Shop, open_counter: Any) -> None:
    async def scenario() -> None:
        async with open_counter(small_shop) as counter:
            assert (await counter.post()).status == 200
            other = sqlite3.connect(small_shop.url.removeprefix("sqlite:///"))  # as another process does it
            other.execute("UPDATE api_key SET disabled = 1")
            other.commit()
            other.close()
            small_shop.clock.move(5)
            heard = await counter.post()
            assert (heard.status, heard.error()["code"]) == (401, "invalid_api_key")
            assert heard.headers["www-authenticate"] == "Bearer"

    asyncio.run(scenario())


def test_a_store_that_is_away_is_a_503_and_running_requests_end_and_are_charged_later(
    small_shop: Shop, open_counter: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, **given: Any) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    async def scenario() -> None:
        async with open_counter(small_shop) as counter:
            away = monkeypatch.context()
            patch = away.__enter__()

            def take_away(message: dict[str, Any]) -> None:
                patch.setattr("ernie_serve.billing.database.Database.transaction", full)

            running = await counter.post(stream=True, on_send=take_away, **USAGE)
            assert running.chunks()[-1]["usage"]["cost_nano_usd"] == 2 * 70 + 14 * 280
            assert running.body.endswith(b"[DONE]\n\n")
            num_asked = len(engine.requests)
            for stream in (False, True):
                refused = await counter.post(stream=stream)
                assert (refused.status, refused.error()["code"]) == (503, "billing_unavailable")
                assert int(refused.headers["retry-after"]) >= 1
            assert len(engine.requests) == num_asked
            assert counter.meter.counters.unsettled > 0
            away.__exit__(None, None, None)
            assert await counter.meter.upkeep.settle_waiting() == 0
            assert 10**9 - await counter.balance() == (await counter.row()).cost_nano == 2 * 70 + 14 * 280

    asyncio.run(scenario())


def idempotent(key: str) -> dict[str, Any]:
    return {"headers": {"idempotency-key": key}}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES])
def test_an_idempotency_key_replays_a_finished_answer_and_refuses_another_body(
    shop: Shop, open_counter: Any, engine: Any, path: str
) -> None:
    async def scenario() -> None:
        async with open_counter(shop) as counter:
            first = await counter.post(path, **idempotent("a"))
            again = await counter.post(path, **idempotent("a"))
            assert (first.status, again.status, again.body) == (200, 200, first.body)
            assert [each.headers.get("idempotent-replayed") for each in (first, again)] == [None, "true"]
            other = await counter.post(path, temperature=0.5, **idempotent("a"))
            assert (other.status, other.error()["code"]) == (422, "idempotency_mismatch")
            assert len(engine.requests) == len(await counter.rows()) == 1
            assert (await counter.post(path, **idempotent("b"))).body != first.body
            theirs = (await shop.new_key(counter.meter, name="other")).key
            assert (await counter.post(path, theirs, **idempotent("a"))).body != first.body
            assert len(engine.requests) == 3

    asyncio.run(scenario())


def test_the_same_key_elsewhere_is_another_body(small_shop: Shop, open_counter: Any) -> None:
    async def scenario() -> None:
        async with open_counter(small_shop) as counter:
            for path, status in ((COMPLETIONS, 200), (COMPLETIONS + "/", 200), (CHAT, 422)):
                fields = BODIES[CHAT] | BODIES[COMPLETIONS]
                heard = await counter.post_to(counter.app, path, fields, counter.key, headers={"idempotency-key": "a"})
                assert heard.status == status

    asyncio.run(scenario())


def test_what_runs_or_was_streamed_is_a_conflict_and_what_failed_may_be_tried_again(
    small_shop: Shop, open_counter: Any, engine: Any
) -> None:
    async def scenario() -> None:
        async with open_counter(small_shop) as counter:
            engine.hang_after = 1
            gone = asyncio.Event()
            running = asyncio.ensure_future(counter.post(gone=gone, **idempotent("a")))
            await until(lambda: engine.begun.is_set())
            refused = await counter.post(**idempotent("a"))
            assert (refused.status, refused.error()["code"]) == (409, "idempotency_conflict")
            assert refused.headers["retry-after"] == "1"
            gone.set()
            await running
            engine.hang_after = None
            assert (await counter.post(**idempotent("a"))).status == 200
            engine.break_after = 1
            assert (await counter.post(**idempotent("b"))).status == 500
            engine.break_after = None
            assert (await counter.post(**idempotent("b"))).status == 200
            assert (await counter.post(stream=True, **idempotent("c"))).status == 200
            streamed = await counter.post(stream=True, **idempotent("c"))
            assert (streamed.status, "not kept" in streamed.error()["message"]) == (409, True)
            wrong = await counter.post(**idempotent("x" * 256))
            assert (wrong.status, "Idempotency-Key" in wrong.error()["message"]) == (400, True)

    asyncio.run(scenario())


def test_an_answer_whose_client_left_at_the_last_moment_can_be_had_again(
    small_shop: Shop, open_counter: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_counter(small_shop) as counter:
            gone = asyncio.Event()
            settle, charged = counter.meter.settle, list[Charge]()

            async def slow(charging: Charging) -> Charge:
                for _ in range(9):
                    await asyncio.sleep(0)
                charged.append(await charging)
                return charged[0]

            def leaving(*args: Any, **given: Any) -> Awaitable[Charge]:
                gone.set()
                return slow(settle(*args, **given))

            with monkeypatch.context() as patch:
                patch.setattr(counter.meter, "settle", leaving)
                lost = await counter.post(gone=gone, **idempotent("a"))
            assert lost.status == 0
            assert charged == []
            await until(lambda: bool(charged))
            again = await counter.post(**idempotent("a"))
            assert (again.status, again.headers["idempotent-replayed"]) == (200, "true")
            assert len(engine.requests) == 1
            assert (await counter.row()).status == "ok"

    asyncio.run(scenario())


def test_a_thousand_streams_cut_anywhere_pay_for_what_was_sent(
    small_shop: Shop, open_counter: Any, engine: Any
) -> None:
    chance = random.Random(45)
    engine.reply, engine.step, engine.turns = "x" * 1000, 3, 6

    async def scenario() -> None:
        async with open_counter(small_shop, max_model_len=10_000) as counter:
            gate = asyncio.Semaphore(50)
            sent: dict[str, int] = {}

            async def stream() -> None:
                async with gate:
                    heard = await counter.post(stream=True, max_tokens=60, leave_after=chance.randrange(1, 24))
                    chunks = heard.chunks()
                    sent[chunks[0]["id"]] = sum(len(each["choices"][0]["text"]) for each in chunks)

            await asyncio.gather(*(stream() for _ in range(1000)))
            rows = {row.request_id: row for row in await counter.rows()}
            assert rows.keys() == sent.keys()
            beyond = {rows[name].completion - num_sent for name, num_sent in sent.items()}
            assert beyond <= {0, engine.step}
            assert {row.status for row in rows.values()} == {"ok", "cancelled"}
            assert all(row.cost_nano == 140 + 280 * row.completion for row in rows.values())
            assert 10**9 - await counter.balance() == sum(row.cost_nano for row in rows.values())
            assert counter.meter.counters.reserved == counter.meter.counters.settled == 1000

    asyncio.run(scenario())


def test_an_order_holds_the_most_that_a_job_can_cost(small_shop: Shop, open_counter: Any) -> None:
    orders: list[Order] = []

    async def scenario() -> None:
        async with open_counter(small_shop) as counter:
            reserve = counter.meter.reserve

            async def noting(caller: Caller, order: Order) -> Any:
                orders.append(order)
                return await reserve(caller, order)

            counter.meter.reserve = noting  # type: ignore[method-assign]
            for fields in ({}, {"max_tokens": 5, "n": 2, "prompt": ["a", "bcd"]}):
                await counter.post(**fields)
            await counter.post(CHAT)

    asyncio.run(scenario())
    told = [(order.prompt_tokens, order.max_tokens, order.most_tokens, order.n) for order in orders]
    assert told == [(2, None, 16, 1), (4, 5, 5, 4), (20, None, 236, 1)]
    assert {order.model for order in orders} == {"baidu/ernie"}


def test_a_kept_response_tells_its_cost_as_it_was_told(small_shop: Shop, open_counter: Any, tmp_path: Path) -> None:
    file = ResponseFile(tmp_path / "responses.db")

    async def scenario() -> None:
        async with open_counter(small_shop, prices=Prices(input_nano=0, output_nano=1), responses=file) as counter:
            made = await counter.post(RESPONSES)
            path = f"{RESPONSES}/{made.json()['id']}"
            headers = {"authorization": f"Bearer {counter.key}"}
            async with httpx.AsyncClient(transport=httpx.ASGITransport(counter.app), base_url="http://test") as client:
                again = await client.get(path, headers=headers)
            assert again.content == made.body
            assert b'"cost":0.000000014,' in made.body

    asyncio.run(scenario())
    file.close()
