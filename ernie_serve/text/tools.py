"""Tools and tool calls in the messages that a chat template is given.

Knows the shape of OpenAI's tools and messages. Validates nothing, and knows nothing of tokens or HTTP.

A template that lists tools is given them as they are. For one that ignores them (the published -PT checkpoints) the
conversation is rewritten into what every template renders: system, user and assistant messages of plain text.

    tools           the end of the system message: see `tool_prompt`
    tool calls      the end of the assistant's message: <tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>
    tool results    a user message: <tool_response>\\n…\\n</tool_response>, one block for each result

These tags pass through the template like any text of a client: they become no control tokens, and set nothing apart
that the plain `User:` and `Assistant:` of such a template do not set apart either.
"""

import json
from collections.abc import Sequence
from typing import Any

from ernie_serve.text.conversation import normalise_messages
from ernie_serve.text.stream import END_OF_TOOL_CALL, TOOL_CALL
from ernie_serve.text.template import ChatTemplate

Json = dict[str, Any]


def prepare(
    messages: Sequence[Json], tools: Sequence[Json], template: ChatTemplate, *, tool_choice: str = "auto"
) -> tuple[list[Json], list[Json] | None]:
    """The messages and the tools to give to `template.render`, for tools in OpenAI's chat form.

    `tool_choice` is "none", "auto", "required" or a tool's name. With "none" the model is not told of any tool.
    Tool results stand in the order of the calls that they answer, because templates do not render ids.
    """
    offered = [] if tool_choice == "none" else list(tools)
    ordered = _in_order_of_calls(messages)
    if template.uses_tools:
        return ordered, offered or None
    rewritten = _rewrite(normalise_messages(ordered))
    if offered:
        rewritten = _with_system_text(rewritten, tool_prompt(offered, tool_choice))
    return rewritten, None


def tool_prompt(tools: Sequence[Json], tool_choice: str = "auto") -> str:
    """What a model is told of its tools where its template does not do it."""
    listed = json.dumps(list(tools), ensure_ascii=False)
    when = {
        "auto": "Call a function only where it helps; otherwise answer in words.",
        "required": "Answer with at least one call.",
    }.get(tool_choice, f"Answer with a call of {json.dumps(tool_choice, ensure_ascii=False)}.")
    return (
        f"You can call these functions:\n<tool_list>\n{listed}\n</tool_list>\n\n"
        "To call one, write a block like this, on lines of its own, with the function's name and a JSON object of its "
        f"arguments:\n{call_block('NAME', {'PARAMETER': 'VALUE'})}\n"
        "For several calls, write several blocks and nothing between them. The results then come in <tool_response> "
        f"blocks. {when}"
    )


def call_block(name: str, arguments: object) -> str:
    """One call as models write it. Arguments that are text stand as they are."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    named = json.dumps(name, ensure_ascii=False)
    return f'{TOOL_CALL}\n{{"name": {named}, "arguments": {text}}}\n{END_OF_TOOL_CALL}'


def _in_order_of_calls(messages: Sequence[Json]) -> list[Json]:
    """The messages, with each run of tool results sorted like the calls before it. Unknown ids come last."""
    ordered: list[Json] = []
    places: dict[Any, int] = {}
    run: list[Json] = []
    for message in messages:
        if message.get("role") == "tool":
            run.append(message)
            continue
        ordered += _sorted_results(run, places)
        run = []
        ordered.append(message)
        if message.get("role") == "assistant":
            places = {call.get("id"): place for place, call in enumerate(message.get("tool_calls") or [])}
    return ordered + _sorted_results(run, places)


def _sorted_results(results: Sequence[Json], places: dict[Any, int]) -> list[Json]:
    return sorted(results, key=lambda result: places.get(result.get("tool_call_id"), len(places)))


def _rewrite(messages: Sequence[Json]) -> list[Json]:
    """Calls and results as text of assistant and user messages."""
    rewritten: list[Json] = []
    after_result = False
    for message in messages:
        is_result = message.get("role") == "tool"
        if is_result:
            block = f"<tool_response>\n{message['content']}\n</tool_response>"
            if after_result:
                rewritten[-1]["content"] += "\n" + block
            else:
                rewritten.append({"role": "user", "content": block})
        else:
            rewritten.append(_with_calls_as_text(message))
        after_result = is_result
    return rewritten


def _with_calls_as_text(message: Json) -> Json:
    message = dict(message)
    functions = [call["function"] for call in message.pop("tool_calls", None) or []]
    if message.get("role") != "assistant":
        return message
    blocks = [call_block(function["name"], function.get("arguments", {})) for function in functions]
    return message | {"content": "\n".join([message["content"], *blocks] if message["content"] else blocks)}


def _with_system_text(messages: list[Json], text: str) -> list[Json]:
    """The messages with a text at the end of the system message, which is made where there is none."""
    if messages and messages[0].get("role") in ("system", "developer"):
        first = messages[0]
        content = f"{first['content']}\n\n{text}" if first["content"] else text
        return [first | {"role": "system", "content": content}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
