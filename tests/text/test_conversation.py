import copy

import pytest

from ernie_serve.text.conversation import normalise_messages


def one(message, **options):
    return normalise_messages([message], **options)[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": 1}', {"a": 1}), ("", {}), ({"a": 1}, {"a": 1}), ("[1]", "[1]"), ("{", "{"), ("[" * 99999, "[" * 99999)],
)
def test_tool_arguments_become_objects_where_they_are(arguments, expected):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    result = one({"role": "assistant", "content": "", "tool_calls": [call]})
    assert result["tool_calls"][0]["function"] == {"name": "f", "arguments": expected}


def test_reasoning_has_both_names():
    message = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    assert one(message) == {**message, "thinking": "r"}


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
    messages = [{"role": "assistant", "content": "a", "tool_calls": [{"function": {"arguments": "{}"}}]}]
    before = copy.deepcopy(messages)
    normalise_messages(messages, split_reasoning=True)
    assert messages == before
