import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_serve.text.json_scanner import JsonScanner

FRAGMENTS = [
    *'{}[]:,"\\ \n\t-+.eE0127uaft/\x00é',
    *[
        "true",
        "false",
        "null",
        "tru",
        '"a"',
        '"\\u00e9"',
        '"\\ud83d\\ude42"',
        '"\\x"',
        "1.5e-3",
        "-0",
        "01",
        "1.",
        "NaN",
    ],
    *['"a":', '{"a": 1}', "[]", '"北京🙂"', "-", ", ", "Infinity"],
]
jsonish = st.lists(st.sampled_from(FRAGMENTS), max_size=7).map("".join)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)


def read(text, *, one_by_one=False):
    """How much of the text is read, and whether a value is whole there."""
    scanner = JsonScanner()
    at = 0
    while at < len(text):
        end = scanner.step(text[: at + 1] if one_by_one else text, at)
        if end == at:
            break
        at = end
    return at, scanner.done


def is_json(text):
    def refuse(word):
        raise ValueError(word)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


@settings(deadline=None, max_examples=1500, derandomize=True)
@given(text=jsonish)
def test_reads_what_json_reads_and_nothing_else(text):
    text = f"[{text}]"
    at, done = read(text)
    assert (done and at == len(text)) == is_json(text)
    assert read(text, one_by_one=True) == (at, done)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(value=values, ascii_only=st.booleans(), indent=st.sampled_from([None, 2]))
def test_every_beginning_of_a_value_is_read(value, ascii_only, indent):
    text = json.dumps([value], ensure_ascii=ascii_only, indent=indent)
    assert read(text) == (len(text), True)
    for cut in range(len(text)):
        assert read(text[:cut]) == (cut, False)


@pytest.mark.parametrize(
    ("text", "num_read"),
    [('{"a": tru,', 9), ('["\n"]', 2), ("[1.]", 3), ("[01]", 2), ("[1}", 2), ('{"a"}', 4), ("[,", 1), ('["\\ug"', 4)],
)
def test_stops_at_the_first_character_that_cannot_follow(text, num_read):
    assert read(text) == (num_read, False)


def test_nothing_follows_a_whole_value():
    assert read('{"a": 1} x') == (8, True)


def test_values_may_be_nested_as_deep_as_they_like():
    depth = 5000
    assert read("[" * depth + "]" * depth) == (2 * depth, True)
    assert read('{"a":' * depth + "1" + "}" * depth) == (6 * depth + 1, True)
