"""Chat messages as clients send them, in the form that chat templates read.

Knows the shape of OpenAI's messages and the framing of ERNIE's reasoning. Knows nothing about tokens or HTTP.
"""

import json
from collections.abc import Sequence
from typing import Any

from ernie_serve.errors import InvalidRequest

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_THINK, _END_OF_THINK = "<think>", "</think>"
_RESPONSE, _END_OF_RESPONSE = "<response>", "</response>"


def normalise_messages(messages: Sequence[dict[str, Any]], *, split_reasoning: bool = False) -> list[dict[str, Any]]:
    """Copies with text for content, objects for tool arguments, and no empty fields.

    Text parts are joined by newlines; no content is "". Reasoning has its field, `reasoning_content`, whichever of
    the usual names it came under. With `split_reasoning`, an assistant's content that still holds its raw
    `…</think>…` is split into that field and the answer, the `<response>` frame taken off.
    Raises `InvalidRequest` for parts that are not text.
    """
    return [_normalise(message, index, split_reasoning) for index, message in enumerate(messages)]


def _normalise(message: dict[str, Any], index: int, split_reasoning: bool) -> dict[str, Any]:
    result = {key: value for key, value in message.items() if value is not None}
    result["content"] = _flatten(result.get("content", ""), index)
    if isinstance(calls := result.get("tool_calls"), list):
        result["tool_calls"] = [_with_object_arguments(call) for call in calls]
    reasoning = next((result[name] for name in _REASONING_FIELDS if name in result), None)
    if reasoning is not None:
        return {"thinking": reasoning, **result, "reasoning_content": reasoning}
    if split_reasoning and result.get("role") == "assistant" and _END_OF_THINK in result["content"]:
        reasoning, _, answer = result["content"].partition(_END_OF_THINK)
        reasoning = reasoning.rpartition(_THINK)[2].strip("\n")
        return result | {"content": _unframed(answer), "reasoning_content": reasoning, "thinking": reasoning}
    return result


def _flatten(content: object, index: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(
            f"messages[{index}].content must be a string or a list of text parts, not {type(content).__name__}.",
            param=f"messages[{index}].content",
        )
    texts: list[str] = []
    for number, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else part
        if kind not in ("text", "refusal", "input_text", "output_text") or not isinstance(text, str):
            raise InvalidRequest(
                f"messages[{index}].content[{number}] is not a text part; this model reads text only.",
                param=f"messages[{index}].content[{number}]",
            )
        texts.append(text)
    return "\n".join(texts)


def _with_object_arguments(call: Any) -> Any:
    """A tool call whose arguments are the object that their JSON text says, where it says one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
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
