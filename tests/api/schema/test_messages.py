from typing import Any

import pytest

from ernie_serve.api.schema.messages import read_messages
from ernie_serve.errors import InvalidRequest


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def test_roles_are_those_templates_know() -> None:
    roles = ["system", "developer", "user", "assistant"]
    read = read_messages([{"role": role, "content": "a"} for role in roles])
    assert [message["role"] for message in read] == ["system", "system", "user", "assistant"]


def test_content_is_always_a_string() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_messages([user(parts)]) == [user("a\nb")]
    assert (
        read_messages([{"role": "assistant", "content": None}, {"role": "assistant"}])
        == [{"role": "assistant", "content": ""}] * 2
    )
    assert read_messages([user("")]) == [user("")]
    empty = [{"role": "assistant", "content": []}, {"role": "tool", "tool_call_id": "c", "content": []}]
    assert [message["content"] for message in read_messages(empty)] == ["", ""]


def test_name_is_kept_and_fields_without_value_are_not() -> None:
    assert read_messages([user("a", name="Ada", refusal=None, tool_calls=[], audio=None, other=1)]) == [
        user("a", name="Ada")
    ]


def test_as_many_messages_as_the_limit() -> None:
    assert len(read_messages([user("a")] * 2048)) == 2048
    with pytest.raises(InvalidRequest, match="1 to 2048 messages, not 2049"):
        read_messages([user("a")] * 2049)


def test_as_many_parts_as_the_limit() -> None:
    part = {"type": "text", "text": ""}
    read_messages([user([part] * 1024)])
    with pytest.raises(InvalidRequest, match="1 to 1024 text parts"):
        read_messages([user([part] * 1025)])


WRONG: list[tuple[Any, str]] = [
    (None, "messages"),
    ("hi", "messages"),
    ({}, "messages"),
    ([], "messages"),
    (["hi"], "messages[0]"),
    ([user("a"), None], "messages[1]"),
    ([{}], "messages[0].role"),
    ([{"role": "robot", "content": "a"}], "messages[0].role"),
    ([{"role": ["user"], "content": "a"}], "messages[0].role"),
    ([{"role": "tool", "content": "a"}], "messages[0].tool_call_id"),
    ([{"role": "function", "content": "a", "name": "x"}], "messages[0].role"),
    ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
    ([{"role": "assistant", "content": None, "function_call": {"name": "x"}}], "messages[0].function_call"),
    ([{"role": "user"}], "messages[0].content"),
    ([user(None)], "messages[0].content"),
    ([user(7)], "messages[0].content"),
    ([user({"type": "text", "text": "a"})], "messages[0].content"),
    ([user([])], "messages[0].content"),
    ([user(["a"])], "messages[0].content[0].type"),
    ([user([{"text": "a"}])], "messages[0].content[0].type"),
    ([user([{"type": "text"}])], "messages[0].content[0].text"),
    ([user([{"type": "text", "text": None}])], "messages[0].content[0].text"),
    ([user("a", name=7)], "messages[0].name"),
    ([user("a", name="n" * 257)], "messages[0].name"),
]


@pytest.mark.parametrize(("messages", "param"), WRONG, ids=[f"{n}-{param}" for n, (_, param) in enumerate(WRONG)])
def test_what_is_no_text_is_refused_with_its_place(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read_messages(messages)
    assert raised.value.param == param
    assert f"`{param.removesuffix('.type')}" in raised.value.message


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal"])
def test_other_parts_are_refused_by_name(kind: str) -> None:
    with pytest.raises(InvalidRequest, match=kind):
        read_messages([user([{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "http://x"}}])])


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_calls_and_their_results_are_kept() -> None:
    assistant = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    tool = {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "a"}]}
    assert read_messages([assistant, tool]) == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "a"},
    ]


def test_reasoning_and_refusals_of_the_assistant_are_kept() -> None:
    for field in ("reasoning_content", "reasoning"):
        assert read_messages([{"role": "assistant", "content": "a", field: "r"}])[0]["reasoning_content"] == "r"
    assert read_messages([user("a", reasoning_content="r")]) == [user("a")]
    assert read_messages([{"role": "assistant", "refusal": "no"}]) == [{"role": "assistant", "content": "no"}]
    parts = [{"type": "refusal", "refusal": "no"}]
    assert read_messages([{"role": "assistant", "content": parts}])[0]["content"] == "no"


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (1, "[0]"),
        ({**CALL, "type": "custom"}, "[0].type"),
        ({**CALL, "function": "f"}, "[0].function"),
        ({**CALL, "function": {"arguments": "{}"}}, "[0].function.name"),
        ({**CALL, "function": {"name": "f", "arguments": {}}}, "[0].function.arguments"),
        ({**CALL, "id": 1}, "[0].id"),
    ],
)
def test_what_is_no_call_is_refused_with_its_place(call: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read_messages([{"role": "assistant", "tool_calls": [call]}])
    assert raised.value.param == f"messages[0].tool_calls{param}"
