import json

import pytest

from ernie_serve.text.call_reader import CallReader

NAMES = {"get_weather", "f"}


def read(text, size=None):
    """The reader after the text, the arguments it told, and where it stopped."""
    reader, told, at = CallReader(NAMES), [], 0
    size = size or len(text)
    for start in range(0, len(text), size):
        piece = text[start : start + size]
        end = reader.feed(piece, 0)
        told.append(reader.take())
        at += end
        if end < len(piece):
            break
    return reader, told, at


@pytest.mark.parametrize("size", [None, 1, 2, 3, 7])
@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', '{"a": 1}'),
        ('{"arguments": {"a": 1}, "name": "f"}', '{"a": 1}'),
        ('{"name":"f","arguments":{}}', "{}"),
        ('\n {\n"name" : "f" ,\n"arguments" : { "a" : [ 1 , { } ] } }', '{ "a" : [ 1 , { } ] }'),
        ('{"n\\u0061me": "\\u0066", "arguments": {"城市": "北京🙂"}}', '{"城市": "北京🙂"}'),
        ('{"name": "f", "arguments": {"a": "}\\"{\\\\", "b": "\\u5317"}}', '{"a": "}\\"{\\\\", "b": "\\u5317"}'),
        ('{"id": {"name": "x", "arguments": 1}, "name": "f", "arguments": {"b": {"c": []}}}', '{"b": {"c": []}}'),
        ('{"name": "f", "arguments": {"name": "x", "arguments": 2}, "type": {"a": ["function"]}}', None),
        ('{"name": "f"}', "{}"),
        ('{"x": [null, true, 1.5], "name": "f"}', "{}"),
    ],
)
def test_a_call_is_read(text, arguments, size):
    reader, told, at = read(text, size)
    assert (reader.begun, reader.complete, reader.closed, reader.failed, at) == (True, True, True, False, len(text))
    assert reader.name == "f"
    assert "".join(told) == (arguments or '{"name": "x", "arguments": 2}')
    json.loads("".join(told))


@pytest.mark.parametrize("size", [None, 1, 3])
@pytest.mark.parametrize(
    "text",
    [
        "x",
        '"f"',
        "[]",
        "1",
        '{"name": "g", "arguments": {}}',
        '{"name": 1}',
        '{"name": ["f"], "arguments": {}}',
        '{"name": null}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": null}',
        '{"name": "f", "arguments": 1}',
        '{"arguments": {}, "name": "g"}',
        '{"arguments": {}}',
        "{}",
        '{"name": "f", "name": "f"}',
        '{"arguments": {}, "arguments": {}, "name": "f"}',
        '{"name" "f"}',
        '{"arguments": {"a": tru}, "name": "f"}',
        "{'name': 'f'}",
    ],
)
def test_what_is_no_call_fails_before_anything_is_told(text, size):
    reader, told, _ = read(text, size)
    assert (reader.failed, reader.begun, "".join(told)) == (True, False, "")


def test_arguments_are_told_as_they_come():
    _, told, _ = read('{"name": "f", "arguments": {"a": "xyz"}}', 10)
    assert "".join(told) == '{"a": "xyz"}'
    assert sum(bool(piece) for piece in told) > 1


def test_arguments_that_come_first_wait_for_the_name():
    reader, told, _ = read('{"arguments": {"a": 1}, "name": "')
    assert (reader.begun, told) == (False, [""])
    reader.feed('f"', 0)
    assert (reader.begun, reader.complete, reader.take()) == (True, True, '{"a": 1}')


def test_arguments_that_break_end_where_they_break():
    reader, told, at = read('{"name": "f", "arguments": {"a": tru!}}')
    assert (reader.begun, reader.complete, reader.failed) == (True, False, True)
    assert ("".join(told), at) == ('{"a": tru', 36)


def test_what_follows_whole_arguments_changes_nothing():
    reader, told, at = read('{"name": "f", "arguments": {}, "name": "g", "arguments": [{}], !')
    assert (reader.complete, reader.failed, reader.name, "".join(told), at) == (True, True, "f", "{}", 63)
