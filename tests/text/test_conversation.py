import copy

import pytest

from ernie_serve.errors import InvalidRequest
from ernie_serve.text.conversation import normalise_messages


def one(message, **options):
    return normalise_messages([message], **options)[0]


def test_content_becomes_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert one({"role": "user", "content": parts})["content"] == "a\nb"
    assert one({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]})["content"] == "no"
    assert one({"role": "assistant", "content": None})["content"] == ""
    assert one({"role": "assistant"})["content"] == ""


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "http://x"}}, {"type": "text"}, 3, None])
def test_parts_that_are_no_text_are_refused_by_place(part):
    with pytest.raises(InvalidRequest) as caught:
        normalise_messages([{"role": "user", "content": "a"}, {"role": "user", "content": ["b", part]}])
    assert caught.value.param == "messages[1].content[1]"


def test_content_of_another_type_is_refused():
    with pytest.raises(InvalidRequest, match="not int"):
        one({"role": "user", "content": 3})


def test_empty_fields_are_left_out():
    assert one({"role": "user", "content": "a", "name": None, "tool_calls": None}) == {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": 1}', {"a": 1}), ("", {}), ({"a": 1}, {"a": 1}), ("[1]", "[1]"), ("{", "{"), ("[" * 99999, "[" * 99999)],
)
def test_tool_arguments_become_objects_where_they_are(arguments, expected):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    result = one({"role": "assistant", "content": None, "tool_calls": [call, "junk"]})
    assert result["tool_calls"][0]["function"] == {"name": "f", "arguments": expected}
    assert result["tool_calls"][1] == "junk"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_one_name(name):
    assert one({"role": "assistant", "content": "a", name: "r"})["reasoning_content"] == "r"


@pytest.mark.parametrize(
    "content",
    [
        "r\n</think>\n\n<response>\na\n</response>\n",
        "<think>\nr\n</think>\n\na",
        "r</think>a",
    ],
)
def test_raw_reasoning_is_split_from_an_answer(content):
    result = one({"role": "assistant", "content": content}, split_reasoning=True)
    assert (result["reasoning_content"], result["content"]) == ("r", "a")


def test_only_an_assistants_raw_reasoning_is_split():
    assert one({"role": "user", "content": "r</think>a"}, split_reasoning=True)["content"] == "r</think>a"
    assert one({"role": "assistant", "content": "r</think>a"})["content"] == "r</think>a"


def test_given_reasoning_leaves_the_content_alone():
    message = {"role": "assistant", "content": "a</think>b", "reasoning_content": "r"}
    assert one(message, split_reasoning=True)["content"] == "a</think>b"


def test_the_callers_messages_stay_as_they_are():
    messages = [{"role": "assistant", "content": ["a"], "tool_calls": [{"function": {"arguments": "{}"}}], "x": None}]
    before = copy.deepcopy(messages)
    normalise_messages(messages, split_reasoning=True)
    assert messages == before
