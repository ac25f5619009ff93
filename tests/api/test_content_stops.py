from typing import Any

import pytest

from ernie_serve.api.content_stops import ContentStops
from ernie_serve.api.events import CallBegun, Event, ReasoningDelta, TextDelta
from ernie_serve.messages import TokenLogprobs


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def told(pieces: list[str], *stops: str, **options: Any) -> tuple[str, int, bool]:
    """The content that is shown of tokens with these texts, how many tokens are told, and whether it was stopped."""
    checker = ContentStops(0, stops, **options)
    shown: list[Event] = []
    ids: list[int] = []
    for number, piece in enumerate(pieces):
        events, placed = checker.push([TextDelta(0, piece)], [(0, TokenLogprobs(number, -1.0, []))])
        shown += events
        ids += [token.token_id for _, token in placed]
    events, placed = checker.finish()
    ids += [token.token_id for _, token in placed]
    assert ids == list(range(len(ids)))
    return text_of([*shown, *events]), len(ids), checker.stopped


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (list("a STOP b"), ("a ", 2, True)),
        (["a ST", "OP b"], ("a ", 1, True)),
        (list("a STO"), ("a STO", 5, False)),
        (list("SSTOP"), ("S", 1, True)),
        (["S", "ST", "OP"], ("S", 1, True)),
        (list("STOP"), ("", 0, True)),
        (["a", "ST", "op"], ("aSTop", 3, False)),
        ([], ("", 0, False)),
    ],
)
def test_content_and_its_logprobs_end_before_a_stop_string(pieces: list[str], expected: tuple[str, int, bool]) -> None:
    assert told(pieces, "STOP") == expected


def test_a_stop_string_may_be_included() -> None:
    assert told(list("a STOP b"), "STOP", "TO", include_stop=True) == ("a STO", 5, True)


def test_a_stop_string_does_not_reach_over_a_call() -> None:
    stops = ContentStops(3, ["STOP"])
    call = CallBegun(3, 0, "call_1", "f")
    events, _ = stops.push([TextDelta(3, "ST"), call, TextDelta(3, "OP")], [])
    assert events == [TextDelta(3, "ST"), call, TextDelta(3, "OP")]
    assert not stops.stopped


def test_nothing_follows_a_stop_string() -> None:
    stops = ContentStops(0, ["."])
    call = CallBegun(0, 0, "call_1", "f")
    events, _ = stops.push([ReasoningDelta(0, "a."), TextDelta(0, "b."), TextDelta(0, "c"), call], [])
    assert events == [ReasoningDelta(0, "a."), TextDelta(0, "b")]
    assert stops.stopped


def test_content_passes_while_nobody_looks() -> None:
    stops = ContentStops(0, ["."])
    assert stops.push([TextDelta(0, "a.b")], [], looking=False) == ([TextDelta(0, "a.b")], [])
    assert stops.push([TextDelta(0, "c.d")], []) == ([TextDelta(0, "c")], [])
