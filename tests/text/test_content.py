import pytest
from folded import fold

from ernie_serve.text.content import Content


def told_by(*steps, framed=True, in_response=False):
    """What is told before the end, and all in all. A step is text, or the name of what stands there."""
    events = []
    content = Content(events, framed=framed, in_response=in_response)
    for step in steps:
        method = getattr(content, step, None)
        if method:
            method()
        else:
            content.add(step)
    early = fold(events).content
    content.flush()
    return early, fold(events).content


@pytest.mark.parametrize(
    ("steps", "early", "whole"),
    [
        (["a \n"], "a", "a \n"),
        (["a \n", "b"], "a \nb", "a \nb"),
        (["\n\n a"], " a", " a"),
        (["\n", "\n", " "], None, None),
        (["a\n\n", "end_frame", "\n"], "a", "a"),
        (["a", "end_frame", "\n", "b"], "a\nb", "a\nb"),
        (["open_response", "\na\n\n", "close_response", "\n"], "\na\n", "\na\n"),
        (["open_response", "a\n", "close_response", "\n", "b"], "a\n</response>\nb", "a\n</response>\nb"),
        (["open_response", "a\n", "close_response", "\n", "open_call", "end_frame", "b"], "ab", "ab"),
        (["open_response", "a\n", "close_response", "\n", "open_call", "<tool_call>"], "a\n<tool_call>", None),
        (["open_response", "end_frame", "\n\n", "close_response"], None, None),
    ],
)
def test_space_is_held_back_until_it_is_known_what_follows(steps, early, whole):
    assert told_by(*steps) == (early, whole or early)


def test_a_text_without_frames_keeps_its_space():
    assert told_by("\n\na\n", framed=False) == ("\n\na", "\n\na\n")
    assert told_by("\n", framed=False) == (None, "\n")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], True),
        (["\n "], True),
        (["a"], False),
        (["a\n"], True),
        (["a", "\n"], True),
        (["a\n "], False),
        (["a", "end_frame", " "], True),
        (["open_response"], True),
        (["open_response", "a", "close_response", " "], True),
        (["open_response", "a", "close_response", "reopen_response"], False),
        (["open_response", "a", "close_response", "\n", "reopen_response"], True),
    ],
)
def test_a_line_starts_behind_a_break_or_a_frame(steps, expected):
    content = Content([], framed=True, in_response=False)
    for step in steps:
        method = getattr(content, step, None)
        if method:
            method()
        else:
            content.add(step)
    assert content.line_start == expected


def test_nothing_is_held_back_where_no_frame_can_follow():
    events = []
    content = Content(events, framed=True, in_response=False)
    content.add("a ")
    assert content.is_free
    content.add_verbatim("b \n")
    assert fold(events).content == "a b \n"
