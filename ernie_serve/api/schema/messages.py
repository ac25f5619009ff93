"""The messages of a conversation, as clients send them.

Knows roles, content parts and calls of functions. Knows nothing of templates.
"""

from typing import Any

from ernie_serve.api.schema.validation import kind_of
from ernie_serve.errors import InvalidRequest

MAX_MESSAGES = 2048
MAX_PARTS = 1024
MAX_CALLS = 128
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Who speaks, as clients say it and as templates know it."""

_TEXT = {"type": "string"}
_PARTS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"type": {"enum": ["text"]}, "text": _TEXT},
        "required": ["type", "text"],
    },
}
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {"anyOf": [_TEXT, _PARTS]},
            "name": {**_TEXT, "maxLength": 256},
            "tool_call_id": _TEXT,
        },
        "required": ["role", "content"],
    },
}
"""Messages for the API's own description."""


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """The conversation as templates read it: a role, a content that is always a string, perhaps names and calls.

    Text parts are joined by newlines. Raises `InvalidRequest`, naming the place, for what is no text.
    """
    if not isinstance(messages, list):
        raise InvalidRequest(f"`messages` must be a list, not {kind_of(messages)}.", param="messages")
    if not 0 < len(messages) <= MAX_MESSAGES:
        told = f"`messages` must hold 1 to {MAX_MESSAGES} messages, not {len(messages)}."
        raise InvalidRequest(told, param="messages")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _read_message(message: Any, path: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"`{path}` must be an object, not {kind_of(message)}.", param=path)
    role = message.get("role")
    if role == "function":
        told = f"`{path}.role`: function messages are an old form that is not read. Send a tool message."
        raise InvalidRequest(told, param=f"{path}.role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(f"`{path}.role` must be one of {', '.join(ROLES)}.", param=f"{path}.role")
    for field in ("function_call", "audio"):
        if message.get(field):
            told = f"`{path}.{field}` is not supported by this server. Leave it out."
            raise InvalidRequest(told, param=f"{path}.{field}")
    content = message.get("content")
    if role == "assistant":
        content = content if content is not None else message.get("refusal")
        if content is None:
            content = ""
    read: dict[str, Any] = {"role": ROLES[role], "content": read_content(content, f"{path}.content", role)}
    if (name := message.get("name")) is not None:
        read["name"] = _read_text(name, f"{path}.name", 256)
    if role == "tool":
        read["tool_call_id"] = _read_text(message.get("tool_call_id"), f"{path}.tool_call_id", 256)
    if role == "assistant":
        for field in ("reasoning_content", "reasoning"):
            if message.get(field) is not None:
                read["reasoning_content"] = _read_text(message[field], f"{path}.{field}")
                break
        if message.get("tool_calls"):
            read["tool_calls"] = _read_calls(message["tool_calls"], f"{path}.tool_calls")
    return read


def read_content(content: Any, path: str, role: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """A message's content: a string, or parts of the given kinds joined by newlines.

    An answer or a result may be an empty list.
    """
    if isinstance(content, str):
        return content
    if content == [] and role in ("assistant", "tool"):
        return ""
    if not isinstance(content, list) or not 0 < len(content) <= MAX_PARTS:
        told = f"`{path}` must be a string or a list of 1 to {MAX_PARTS} text parts"
        raise InvalidRequest(f"{told}{'' if isinstance(content, list) else f', not {kind_of(content)}'}.", param=path)
    kinds = (*kinds, "refusal") if role == "assistant" else kinds
    return "\n".join(_read_part(part, f"{path}[{index}]", kinds) for index, part in enumerate(content))


def _read_part(part: Any, path: str, kinds: tuple[str, ...]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in kinds:
        named = f"a part of type {kind[:40]!r}" if isinstance(kind, str) else "no content part"
        told = f"`{path}` is {named}; this model reads parts of type {kinds[0]!r} alone."
        raise InvalidRequest(told, param=f"{path}.type")
    field = "refusal" if kind == "refusal" else "text"
    return _read_text(part.get(field), f"{path}.{field}")


def _read_calls(calls: Any, path: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise InvalidRequest(f"`{path}` must be a list of at most {MAX_CALLS} calls.", param=path)
    return [_read_call(call, f"{path}[{index}]") for index, call in enumerate(calls)]


def _read_call(call: Any, path: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise InvalidRequest(f"`{path}` must be an object, not {kind_of(call)}.", param=path)
    if call.get("type", "function") != "function":
        told = f"`{path}.type` must be 'function'; other calls are not supported by this server."
        raise InvalidRequest(told, param=f"{path}.type")
    function = call.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest(f"`{path}.function` must be an object, not {kind_of(function)}.", param=f"{path}.function")
    name = _read_text(function.get("name"), f"{path}.function.name", 256)
    arguments = _read_text(function.get("arguments", "{}"), f"{path}.function.arguments")
    read = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return read if call.get("id") is None else {"id": _read_text(call["id"], f"{path}.id", 256), **read}


def _read_text(value: Any, path: str, limit: int | None = None) -> str:
    if not isinstance(value, str) or (limit is not None and len(value) > limit):
        most = "" if limit is None else f" of at most {limit} characters"
        raise InvalidRequest(f"`{path}` must be a string{most}.", param=path)
    return value
