from typing import Any

import pytest

from ernie_serve.api.schema.tools import ToolUse
from ernie_serve.api.shaping import reasoning_budget, shape_chat, shape_text
from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar.tools import read
from ernie_serve.messages import Grammar

FORM = Grammar("json_object")
THINKING, ANSWERING = [97, 257, 10], [97, 257, 10, 258, 10]
TOOLS = ToolUse([{"type": "function", "function": {"name": "f"}}], "auto", ("f",))


@pytest.mark.parametrize(
    ("wanted", "variables", "budget"),
    [
        (None, {}, None),
        (5, {"enable_thinking": False}, 5),
        (None, {"enable_thinking": False}, 0),
        (None, {"thinking": False}, 0),
        (None, {"enable_thinking": True}, None),
        (None, {"reasoning_effort": "none"}, 0),
        (None, {"reasoning_effort": "low"}, 1024),
        (None, {"reasoning_effort": "max"}, None),
    ],
)
def test_budget_is_what_is_asked_for_or_what_an_effort_allows(
    wanted: int | None, variables: dict[str, Any], budget: int | None
) -> None:
    assert reasoning_budget(wanted, variables) == budget


def test_text_is_bound_from_its_beginning() -> None:
    assert shape_text(None, "").constraints == {}
    assert shape_text(FORM, "response_format").constraints == {"grammar": FORM}


def test_answer_is_bound_behind_its_reasoning(thinking_services: Any) -> None:
    shape = shape_chat(thinking_services, THINKING, ToolUse(), FORM, "response_format", 7)
    assert (shape.start, shape.constraints["grammar_after_token_id"]) == ("reasoning", 258)
    assert shape.constraints["max_reasoning_tokens"] == 7
    shape = shape_chat(thinking_services, ANSWERING, ToolUse(), FORM, "response_format", 7)
    assert (shape.start, shape.constraints, shape.read) == ("text", {"grammar": FORM}, None)


def test_form_beside_tools_has_the_frame_that_words_have(services: Any, thinking_services: Any) -> None:
    """Where the prompt ends inside `<response>`, or no answer has it, the form begins at once."""
    for prompt_ids, is_framed in ((THINKING, True), (ANSWERING, True), ([*ANSWERING, 259, 10], False)):
        grammar = shape_chat(thinking_services, prompt_ids, TOOLS, FORM, "", None).constraints["grammar"]
        assert (read(grammar.text).words is not None) is is_framed, prompt_ids
    assert read(shape_chat(services, [97], TOOLS, FORM, "", None).constraints["grammar"].text).words is None


def test_end_of_reasoning_that_is_forced_says_nothing_of_the_bound_answer(thinking_services: Any) -> None:
    free = shape_chat(thinking_services, THINKING, ToolUse(), None, "", 7).constraints
    assert free["reasoning_end_forced_ids"] == (10, 258, 10, 10)
    bound = shape_chat(thinking_services, THINKING, ToolUse(), FORM, "response_format", 7).constraints
    assert bound["reasoning_end_forced_ids"] == (10, 258)


def test_plain_answer_is_read_only_for_calls(services: Any) -> None:
    assert shape_chat(services, [97], ToolUse(), None, "", None).read is None
    shape = shape_chat(services, [97], TOOLS, None, "", None)
    assert shape.read is not None
    assert shape.grammar_param == "tools"


def test_checkpoint_without_an_end_of_reasoning_says_what_it_cannot_do(thinking_services: Any) -> None:
    thinking_services.format.end_of_think_id = None
    shape_chat(thinking_services, THINKING, ToolUse(), None, "", None)
    with pytest.raises(InvalidRequest) as raised:
        shape_chat(thinking_services, THINKING, ToolUse(), FORM, "response_format", None)
    assert raised.value.param == "response_format"
    with pytest.raises(InvalidRequest) as raised:
        shape_chat(thinking_services, THINKING, ToolUse(), None, "", 5)
    assert raised.value.param == "max_reasoning_tokens"
