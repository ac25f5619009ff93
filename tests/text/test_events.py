from ernie_serve.text.events import (
    CallArguments,
    CallBegin,
    CallEnd,
    ContentDelta,
    Message,
    ReasoningDelta,
    ToolCall,
    fold,
    merged,
)

EVENTS = [
    *[ReasoningDelta("r"), ReasoningDelta("s"), ContentDelta("a"), ContentDelta("b")],
    *[CallBegin(0, "x", "f"), CallArguments(0, "{"), CallArguments(0, "}"), CallEnd(0)],
    *[CallBegin(1, "y", "g"), CallArguments(1, '{"a'), ContentDelta("c")],
]


def test_a_message_is_what_its_events_tell():
    calls = (ToolCall("x", "f", "{}", True), ToolCall("y", "g", '{"a', False))
    assert fold(EVENTS) == Message("abc", "rs", calls)


def test_nothing_told_is_nothing():
    assert fold([]) == Message(None, None, ())


def test_neighbours_of_one_kind_become_one():
    assert merged(EVENTS) == [
        *[ReasoningDelta("rs"), ContentDelta("ab")],
        *[CallBegin(0, "x", "f"), CallArguments(0, "{}"), CallEnd(0)],
        *[CallBegin(1, "y", "g"), CallArguments(1, '{"a'), ContentDelta("c")],
    ]
    assert fold(merged(EVENTS)) == fold(EVENTS)


def test_arguments_of_two_calls_stay_apart():
    events = [CallArguments(0, "{}"), CallArguments(1, "{}")]
    assert merged(events) == events
