"""However the engine cuts its outputs, the events of a choice add up to the same answer."""

from typing import Any

import pytest

from ernie_serve.api.choice_text import TextOptions
from ernie_serve.api.events import Answer, CallBegun, Event, Finished, PromptScored, ReasoningDelta, TextDelta
from ernie_serve.api.telling import Choice, Job, Telling
from ernie_serve.messages import EngineOutput, EngineRequest, SamplingParams, TokenLogprobs
from ernie_serve.text.stream import AnswerStream

CALL = '\n<tool_call>\n{"name": "f", "arguments": {"a": [1, {}]}}\n</tool_call>\n'


@pytest.fixture
def tell(services: Any) -> Any:
    """The events of a text that arrives so many tokens at a time."""

    def make(ids: list[int], step: int, *, reader: bool = False, **fields: Any) -> list[Event]:
        sampling = SamplingParams(max_tokens=99, seed=0, prompt_logprobs=fields.pop("prompt_logprobs", None))
        request = EngineRequest(request_id="r", prompt_token_ids=[1, 2, 3], sampling=sampling)
        choice = Choice(
            0, 0, True, request, **{name: fields.pop(name) for name in ("opening", "prompt_only") if name in fields}
        )
        text = TextOptions(
            logprobs=True,
            skip_special_tokens=not reader,
            hidden_ids=frozenset({256}) if reader else frozenset(),
            stops=tuple(fields.pop("stops", ())),
            include_stop=fields.pop("include_stop", False),
            min_tokens=fields.pop("min_tokens", 0),
        )
        max_calls = fields.pop("max_calls", None)

        def read() -> AnswerStream:
            return AnswerStream("reasoning", tools=["f"], max_calls=max_calls)

        job = Job(
            id="j",
            choices=[choice],
            text=text,
            stream=True,
            include_usage=False,
            read=read if reader else None,
            start="reasoning" if reader else "text",
            **fields,
        )
        telling = Telling(services.tokenizer, choice, job)
        events: list[Event] = []
        scored = [TokenLogprobs(i, -1.0, []) for i in (2, 3)] if sampling.prompt_logprobs is not None else []
        for start in range(0, len(ids), step):
            part, last = ids[start : start + step], start + step >= len(ids)
            told = telling.push(
                EngineOutput(
                    request_id="r",
                    token_ids=part,
                    logprobs=[TokenLogprobs(i, -0.5, []) for i in part],
                    prompt_logprobs=scored if start == 0 else [],
                    finish_reason="stop" if last else None,
                    stop_token_id=ids[-1] if last else None,
                )
            )
            events += told
            if told and isinstance(told[-1], Finished):
                break
        return events

    return make


def fold(events: list[Event]) -> Answer:
    answer = Answer(0)
    for event in events:
        answer.add(event)
    return answer


def without_ids(answer: Answer) -> Answer:
    for call in answer.calls:
        call.id = ""
    return answer


@pytest.mark.parametrize("step", [1, 2, 3, 7, 30])
def test_cuts_change_nothing(tell: Any, tagged: Any, step: int) -> None:
    ids = [*tagged("Hm 🎉.\n</think>\n\n<response>\nYes é.\n</response>\n" + CALL + CALL), 256]
    events = tell(ids, step, reader=True)
    assert without_ids(fold(events)) == without_ids(fold(tell(ids, 1000, reader=True)))
    answer = fold(events)
    assert (answer.reasoning, answer.text, answer.reason) == ("Hm 🎉.", "Yes é.", "tool_calls")
    assert [call.arguments for call in answer.calls] == ['{"a": [1, {}]}'] * 2
    assert isinstance(events[-1], Finished)
    assert sum(isinstance(event, Finished) for event in events) == 1


def test_events_come_in_the_order_of_the_text(tell: Any, tagged: Any) -> None:
    kinds = [type(event) for event in tell([*tagged("Hm.</think>Yes." + CALL), 256], 1, reader=True)]
    assert kinds.index(ReasoningDelta) < kinds.index(TextDelta) < kinds.index(CallBegun)


@pytest.mark.parametrize("step", [1, 9])
def test_last_wanted_call_ends_the_choice(tell: Any, tagged: Any, step: int) -> None:
    answer = fold(tell([*tagged("</think>" + CALL + CALL), 256], step, reader=True, max_calls=1))
    assert (len(answer.calls), answer.reason) == (1, "tool_calls")


@pytest.mark.parametrize("step", [1, 4, 50])
def test_logprobs_begin_behind_the_reasoning(tell: Any, tagged: Any, step: int) -> None:
    answer = fold(tell([*tagged("Hm.</think>Yes"), 256], step, reader=True))
    assert [chr(token.token_id) for _, token in answer.logprobs] == ["Y", "e", "s"]


@pytest.mark.parametrize("step", [1, 50])
def test_prompt_is_scored_once_and_first(tell: Any, step: int) -> None:
    events = tell([72, 73, 256], step, prompt_logprobs=0, opening="> ")
    assert isinstance(events[0], PromptScored)
    assert [token and token.token_id for token in events[0].logprobs] == [None, 2, 3]
    assert sum(isinstance(event, PromptScored) for event in events) == 1
    answer = fold(events)
    assert answer.text == "> HI"
    assert [place for place, _ in answer.logprobs] == [2, 3]


def test_prompt_alone_has_no_answer(tell: Any) -> None:
    answer = fold(tell([72, 256], 1, prompt_logprobs=0, opening="> ", prompt_only=True))
    assert (answer.text, answer.logprobs, answer.reason) == ("> ", [], "length")


def test_token_ids_and_mean_likelihood_are_told(tell: Any) -> None:
    answer = fold(tell([72, 73, 256], 2, with_token_ids=True))
    assert (answer.token_ids, answer.mean_logprob) == ([72, 73, 256], -0.5)


FRAMED = "Hm. STOP\n</think>\n\n<response>\nYes é.\n</response>\n" + CALL


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("stops", "reasoning", "text", "num_calls", "reason"),
    [
        (["STOP"], "Hm. STOP", "Yes é.", 1, "tool_calls"),
        (["Hm", "name", "a"], "Hm. STOP", "Yes é.", 1, "tool_calls"),
        (["\n", "<tool_call>", "</think>", "<response>"], "Hm. STOP", "Yes é.", 1, "tool_calls"),
        (["s é"], "Hm. STOP", "Ye", 0, "stop"),
        (["é.?", "Yes é. "], "Hm. STOP", "Yes é.", 1, "tool_calls"),
        ([".", "x"], "Hm. STOP", "Yes é", 0, "stop"),
    ],
)
def test_stop_strings_end_content_alone(
    tell: Any, tagged: Any, step: int, stops: list[str], reasoning: str, text: str, num_calls: int, reason: str
) -> None:
    events = tell([*tagged(FRAMED), 256], step, reader=True, stops=stops)
    answer = fold(events)
    assert (answer.reasoning, answer.text, answer.reason) == (reasoning, text, reason)
    assert [call.arguments for call in answer.calls] == ['{"a": [1, {}]}'] * num_calls
    assert sum(isinstance(event, Finished) for event in events) == 1


@pytest.mark.parametrize("step", [1, 4, 1000])
def test_a_stop_string_takes_its_logprobs_with_it(tell: Any, tagged: Any, step: int) -> None:
    ids = [*tagged("Hm.</think>SST aSSTOPs"), 256]
    for include, text in ((False, "SST aS"), (True, "SST aSSTOP")):
        answer = fold(tell(ids, step, reader=True, stops=["STOP"], include_stop=include))
        assert answer.text == text
        assert "".join(chr(token.token_id) for _, token in answer.logprobs) == text


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_content_is_free_for_its_first_tokens(tell: Any, tagged: Any, step: int) -> None:
    ids = [*tagged("Hm.</think>a.b.c."), 256]
    assert fold(tell(ids, step, reader=True, stops=["."], min_tokens=4)).text == "a"
    assert fold(tell(ids, step, reader=True, stops=["."], min_tokens=6)).text == "a.b"


def test_what_could_have_become_a_stop_string_is_not_lost(tell: Any, tagged: Any) -> None:
    events = tell([*tagged("Hm.</think>so STO"), 256], 1, reader=True, stops=["STOP"])
    assert fold(events).text == "so STO"
    assert [event.text for event in events if isinstance(event, TextDelta) and event.text] == ["s", "o", " ", "STO"]


@pytest.mark.parametrize("step", [1, 5, 1000])
@pytest.mark.parametrize("max_calls", [1, None])
def test_a_call_that_breaks_is_no_reason_to_run_anything(
    tell: Any, tagged: Any, step: int, max_calls: int | None
) -> None:
    broken = tagged("</think>" + CALL.replace("[1, {}]", "[1, oh]"))
    answer = fold(tell([*broken, 256], step, reader=True, max_calls=max_calls))
    assert ([call.arguments for call in answer.calls], answer.reason) == (['{"a": [1, '], "stop")
