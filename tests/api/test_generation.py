import asyncio
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from ernie_serve.api.choice_text import TextOptions
from ernie_serve.api.events import Event, Finished, TextDelta
from ernie_serve.api.generation import Generation, contradiction
from ernie_serve.api.telling import Choice, Job
from ernie_serve.billing.keys import Caller
from ernie_serve.billing.meter import Order, Reservation
from ernie_serve.billing.prices import Prices, Usage
from ernie_serve.engine.constraint import Constraint
from ernie_serve.errors import EngineFailure, EngineUnavailable, InvalidRequest
from ernie_serve.messages import EngineRequest, Grammar, SamplingParams


@pytest.fixture
def make_job() -> Any:
    def make(*prompts: bytes, n: int = 1, max_tokens: int = 50, stops: tuple[str, ...] = (), opening: str = "") -> Job:
        choices = [
            Choice(
                index=p * n + number,
                prompt_index=p,
                is_first=number == 0,
                request=EngineRequest(
                    request_id=f"r{p * n + number}",
                    prompt_token_ids=list(prompt),
                    sampling=SamplingParams(max_tokens=max_tokens, seed=0, stop_token_ids=(256,)),
                ),
                opening=opening,
            )
            for p, prompt in enumerate(prompts)
            for number in range(n)
        ]
        return Job(id="j", choices=choices, text=TextOptions(stops=stops), stream=False, include_usage=False)

    return make


def generation(services: Any, job: Job, covered: int = 1000) -> Generation:
    caller = Caller(account_id="a", project_id="p", key_id="k")
    order = Order(request_id="j", model="m", prompt_tokens=1, most_tokens=1000)
    return Generation(services.engine, services.tokenizer, job, Reservation(caller, order, Prices(), covered))


def events_of(generation: Generation) -> list[Event]:
    async def collect() -> list[Event]:
        async with aclosing(generation.events()) as told:
            return [event async for events in told for event in events]

    return asyncio.run(collect())


def test_events_are_text_then_one_end(services: Any, make_job: Any) -> None:
    events = events_of(generation(services, make_job(b"a")))
    assert all(isinstance(event, TextDelta) for event in events[:-1])
    assert events[-1] == Finished(0, "stop")


def test_answer_is_the_fold_of_the_events(services: Any, engine: Any, make_job: Any) -> None:
    engine.replies = {b"a": "first answer", b"b": "second 🎉"}
    job = make_job(b"a", b"b", n=2)
    texts = ["", "", "", ""]
    for event in events_of(generation(services, job)):
        if isinstance(event, TextDelta):
            texts[event.index] += event.text
    engine.requests.clear()
    answers = asyncio.run(generation(services, job).answers())
    assert [answer.text for answer in answers] == texts == ["first answer"] * 2 + ["second 🎉"] * 2
    assert [answer.index for answer in answers] == [0, 1, 2, 3]
    assert {answer.reason for answer in answers} == {"stop"}


@pytest.mark.parametrize("step", [1, 3, 100])
def test_tokens_of_one_step_change_no_text(services: Any, engine: Any, make_job: Any, step: int) -> None:
    engine.step = step
    assert asyncio.run(generation(services, make_job(b"a")).answers())[0].text == "Hello, world!"


def test_prompt_counts_once_however_many_choices(services: Any, engine: Any, make_job: Any) -> None:
    engine.num_cached = 2
    made = generation(services, make_job(b"abc", b"defg", n=3, max_tokens=5))
    asyncio.run(made.answers())
    assert made.usage == {
        "prompt_tokens": 7,
        "completion_tokens": 30,
        "total_tokens": 37,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_stop_string_ends_the_text_and_the_request(services: Any, engine: Any, make_job: Any) -> None:
    made = generation(services, make_job(b"a", stops=("o, w",)))
    answers = asyncio.run(made.answers())
    assert (answers[0].text, answers[0].reason) == ("Hell", "stop")
    assert engine.left == ["r0"]
    assert made.usage["completion_tokens"] == 8


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_tokens_behind_a_stop_string_are_not_counted_whatever_comes_together(
    services: Any, engine: Any, make_job: Any, step: int
) -> None:
    engine.step = step
    made = generation(services, make_job(b"a", stops=("o, w",)))
    (answer,) = asyncio.run(made.answers())
    assert (answer.text, answer.reason, made.usage["completion_tokens"]) == ("Hell", "stop", 8)
    assert made.used.completion_tokens == 8


def test_opening_stands_before_the_text(services: Any, engine: Any, make_job: Any) -> None:
    assert asyncio.run(generation(services, make_job(b"a", opening="> ")).answers())[0].text == "> Hello, world!"
    engine.reply = ""
    engine.requests.clear()
    assert asyncio.run(generation(services, make_job(b"a", opening="> ")).answers())[0].text == "> "


def test_nothing_to_make_asks_the_engine_nothing(services: Any, engine: Any, make_job: Any) -> None:
    made = generation(services, make_job(b"abc", max_tokens=0, opening="> "))
    assert events_of(made) == [TextDelta(0, "> ", []), Finished(0, "length")]
    assert engine.requests == []
    assert made.usage["prompt_tokens"] == 3
    assert made.usage["completion_tokens"] == 0


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("breakage", "expected"),
    [("error", EngineFailure), (EngineUnavailable("It ended."), EngineUnavailable)],
)
def test_what_breaks_in_the_engine_ends_every_choice(
    services: Any, engine: Any, make_job: Any, n: int, breakage: Any, expected: type[Exception]
) -> None:
    engine.break_after, engine.breakage = 3, breakage
    with pytest.raises(expected):
        asyncio.run(generation(services, make_job(b"a", n=n)).answers())
    assert engine.running == set()


@pytest.mark.parametrize("n", [1, 3])
def test_closing_the_events_ends_every_request(services: Any, engine: Any, make_job: Any, n: int) -> None:
    async def scenario() -> None:
        async with aclosing(generation(services, make_job(b"a", n=n)).events()) as events:
            await anext(events)
        assert engine.running == set()

    asyncio.run(scenario())
    assert len(engine.left) == n


@pytest.mark.parametrize("n", [1, 3])
def test_cancelling_the_reader_ends_every_request(services: Any, engine: Any, make_job: Any, n: int) -> None:
    engine.hang_after = 2

    async def scenario() -> None:
        reader = asyncio.ensure_future(generation(services, make_job(b"a", n=n)).answers())
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(engine.running) == n
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)

    asyncio.run(scenario())
    assert engine.running == set()
    assert len(engine.left) == n


def test_slow_reader_holds_up_the_choices(services: Any, engine: Any, make_job: Any) -> None:
    engine.reply = "x" * 1000

    async def scenario() -> None:
        async with aclosing(generation(services, make_job(b"a", n=2, max_tokens=1000)).events()) as events:
            await anext(events)
            for _ in range(5000):
                await asyncio.sleep(0)

    asyncio.run(scenario())
    assert engine.num_made < 50


def test_constraints_that_forbid_every_token_are_the_client_s_fault(services: Any, engine: Any, make_job: Any) -> None:
    constraint = Constraint(SamplingParams(max_tokens=1, seed=0, allowed_token_ids=(3,), bad_words=((3,),)), num_ids=8)
    constraint.finish_mask(np.zeros(4, np.uint8))
    engine.break_after, engine.error_code = 1, constraint.error_code
    with pytest.raises(InvalidRequest, match="leave no token"):
        events_of(generation(services, make_job(b"a")))


def test_what_to_loosen_is_named() -> None:
    words = SamplingParams(max_tokens=1, seed=0, bad_words=((1,),), grammar=Grammar("json_object"))
    error = contradiction(words, "response_format")
    assert (error.status, error.param) == (400, "bad_words")
    assert "`bad_words` and `response_format`" in error.message
    assert contradiction(SamplingParams(max_tokens=1, seed=0), "tools").param is None


@pytest.mark.parametrize("step", [1, 4, 100])
def test_no_more_is_told_than_is_paid_for(services: Any, engine: Any, make_job: Any, step: int) -> None:
    engine.step = step
    made = generation(services, make_job(b"abc"), covered=6)
    (answer,) = asyncio.run(made.answers())
    assert (answer.text, answer.reason, answer.unpaid) == ("Hello,", "length", True)
    assert made.used == Usage(prompt_tokens=3, completion_tokens=6)
    assert (engine.running, made.finish_reason) == (set(), "length")


def test_what_is_covered_to_the_last_token_ends_by_itself(services: Any, make_job: Any) -> None:
    (answer,) = asyncio.run(generation(services, make_job(b"abc"), covered=14).answers())
    assert (answer.text, answer.reason, answer.unpaid) == ("Hello, world!", "stop", False)


def test_a_stop_string_within_what_is_paid_is_a_stop(services: Any, engine: Any, make_job: Any) -> None:
    engine.step = 100
    (answer,) = asyncio.run(generation(services, make_job(b"abc", stops=("lo",)), covered=6).answers())
    assert (answer.text, answer.reason, answer.unpaid) == ("Hel", "stop", False)


@pytest.mark.parametrize("step", [1, 4])
def test_choices_share_what_is_paid_for(services: Any, engine: Any, make_job: Any, step: int) -> None:
    engine.step = step
    made = generation(services, make_job(b"abc", n=3), covered=20)
    answers = asyncio.run(made.answers())
    assert sum(len(answer.text) for answer in answers) == 20
    assert {answer.unpaid for answer in answers} == {True}
    assert made.used == Usage(prompt_tokens=3, completion_tokens=20)


def test_nothing_is_used_before_the_engine_has_begun(services: Any, make_job: Any) -> None:
    made = generation(services, make_job(b"abc"))
    assert made.used == Usage()
    assert made.first_token_at is None
