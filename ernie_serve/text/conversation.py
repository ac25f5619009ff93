"""Chat messages as the API reads them, in the form that chat templates read.

Knows the shape of OpenAI's messages and the framing of ERNIE's reasoning. Knows nothing about tokens or HTTP.
"""

import json
from collections.abc import Sequence
from typing import Any

_THINK, _END_OF_THINK = "<think>", "</think>"
_RESPONSE, _END_OF_RESPONSE = "<response>", "</response>"


def normalise_messages(messages: Sequence[dict[str, Any]], *, split_reasoning: bool = False) -> list[dict[str, Any]]:
    """Copies with objects for tool arguments, and with reasoning under both names that templates read.

    Messages are those that the API has read: their content is text. With `split_reasoning`, an assistant's content
    that still holds its raw `…</think>…` is split into reasoning and answer, the `<response>` frame taken off.
    """
    return [_normalise(message, split_reasoning) for message in messages]


def _normalise(message: dict[str, Any], split_reasoning: bool) -> dict[str, Any]:
    result = dict(message)
    if calls := message.get("tool_calls"):
        result["tool_calls"] = [_with_object_arguments(call) for call in calls]
    if (reasoning := message.get("reasoning_content")) is not None:
        return {"thinking": reasoning, **result}
    if split_reasoning and message["role"] == "assistant" and _END_OF_THINK in message["content"]:
        reasoning, _, answer = message["content"].partition(_END_OF_THINK)
        reasoning = reasoning.rpartition(_THINK)[2].strip("\n")
        return result | {"content": _unframed(answer), "reasoning_content": reasoning, "thinking": reasoning}
    return result


def _with_object_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are the object that their JSON text says, where it says one."""
    function = call["function"]
    if not isinstance(function["arguments"], str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def _unframed(answer: str) -> str:
    """An answer without the line breaks and the response tags that frame it."""
    answer = answer.strip("\n")
    if answer.startswith(_RESPONSE) and answer.endswith(_END_OF_RESPONSE):
        return answer[len(_RESPONSE) : -len(_END_OF_RESPONSE)].strip("\n")
    return answer
