from ernie_serve.text.events import CallArguments, CallBegin, ContentDelta, ReasoningDelta, merged


def test_neighbours_of_one_kind_become_one():
    assert merged(
        [
            *[ReasoningDelta("r"), ReasoningDelta("s"), ContentDelta("a"), ContentDelta("b")],
            *[CallBegin(0, "x", "f"), CallArguments(0, "{"), CallArguments(0, "}")],
            *[CallBegin(1, "y", "g"), CallArguments(1, '{"a'), ContentDelta("c")],
        ]
    ) == [
        *[ReasoningDelta("rs"), ContentDelta("ab")],
        *[CallBegin(0, "x", "f"), CallArguments(0, "{}")],
        *[CallBegin(1, "y", "g"), CallArguments(1, '{"a'), ContentDelta("c")],
    ]


def test_arguments_of_two_calls_stay_apart():
    events = [CallArguments(0, "{}"), CallArguments(1, "{}")]
    assert merged(events) == events
