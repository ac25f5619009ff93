import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_serve.text.stop import StopChecker


def run(stops, pieces, **options):
    checker = StopChecker(stops, **options)
    shown = "".join(map(checker.push, pieces))
    return shown + checker.flush(), checker.stopped


def naive(stops, text, include_stop):
    """Read one character after the other; look back at each for the longest stop string."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if stop and text[:end].endswith(stop):
                return text[: end if include_stop else end - len(stop)], stop
    return text, None


@st.composite
def cut_texts(draw):
    text = draw(st.text("ab你", max_size=30))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(deadline=None, max_examples=400, derandomize=True)
@given(st.lists(st.text("ab你", max_size=5), max_size=4), cut_texts(), st.booleans())
def test_cutting_a_text_elsewhere_never_changes_where_it_stops(stops, pieces, include_stop):
    assert run(stops, pieces, include_stop=include_stop) == naive(stops, "".join(pieces), include_stop)


def test_a_stop_string_across_pushes_is_never_shown():
    checker = StopChecker(["\nUser:"])
    assert [checker.push(piece) for piece in ["Hi", "\n", "Us", "er", ": more"]] == ["Hi", "", "", "", ""]
    assert checker.stopped == "\nUser:"
    assert checker.push("x") == ""
    assert checker.flush() == ""


def test_text_that_turns_out_harmless_is_shown_at_once():
    checker = StopChecker(["abc"])
    assert checker.push("xab") == "x"
    assert checker.push("abd") == "ababd"
    assert checker.stopped is None


def test_what_is_held_back_is_shorter_than_the_longest_stop():
    rng = random.Random(3)
    checker = StopChecker(["aab", "abababab"])
    pushed = shown = 0
    for _ in range(500):
        piece = "".join(rng.choice("ab") for _ in range(3)).replace("aab", "aaa").replace("bb", "b")
        pushed, shown = pushed + len(piece), shown + len(checker.push(piece))
        if checker.stopped:
            break
        assert pushed - shown <= 7
    assert pushed > 3


def test_flush_gives_what_was_held():
    checker = StopChecker(["###"])
    assert checker.push("a##") == "a"
    assert checker.flush() == "##"
    assert checker.stopped is None


@pytest.mark.parametrize("stops", [[], [""]])
def test_without_stop_strings_everything_passes(stops):
    assert run(stops, ["a", "b"]) == ("ab", None)
