"""The items that a response is asked for with, and the messages that they are.

Knows messages, calls, results and reasoning as items. Knows nothing of templates.
"""

from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

from ernie_serve.api.schema.messages import MAX_MESSAGES, ROLES, read_content
from ernie_serve.api.schema.validation import kind_of
from ernie_serve.errors import InvalidRequest

Item = dict[str, Any]

_PARTS = ("input_text", "output_text", "text")


def read_input(given: Any, find: Callable[[str], Item | None] = lambda item_id: None) -> list[Item]:
    """`input` as items of a conversation, each with an id; `find` has those that references name.

    Raises `InvalidRequest`, naming the place.
    """
    if given is None:
        raise InvalidRequest(
            "`input` is missing. Send there what chat takes as `messages`, or a string.", param="input"
        )
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given, "id": _new_id("msg")}]
    if not isinstance(given, list):
        raise InvalidRequest(f"`input` must be a string or a list of items, not {kind_of(given)}.", param="input")
    if not 0 < len(given) <= MAX_MESSAGES:
        raise InvalidRequest(f"`input` must hold 1 to {MAX_MESSAGES} items, not {len(given)}.", param="input")
    return [_read_item(item, f"input[{index}]", find) for index, item in enumerate(given)]


def messages_of(items: Sequence[Item], instructions: str | None) -> list[dict[str, Any]]:
    """The messages that items are: calls belong to the assistant's message before them, reasoning to that behind it."""
    messages: list[dict[str, Any]] = []
    thought: dict[str, Any] = {}
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        before, thought = thought, {}
        match item["type"]:
            case "reasoning":
                text = "\n".join(part["text"] for part in item.get("content") or ())
                thought = {"reasoning_content": text} if text else {}
            case "message":
                role, own = ROLES[item["role"]], before if item["role"] == "assistant" else {}
                messages.append({"role": role, "content": _text_of(item["content"], item["role"]), **own})
            case "function_call":
                if before or not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": "", **before})
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                content = _text_of(item["output"], "tool")
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
    return messages


def listed(item: Item) -> Item:
    """An item as a list of a response's input tells it."""
    if item["type"] == "reasoning":
        return item
    if item["type"] != "message" or not isinstance(item["content"], str):
        return {"status": "completed", **item}
    kind = "output_text" if item["role"] == "assistant" else "input_text"
    part: dict[str, Any] = {"type": kind, "text": item["content"]}
    if kind == "output_text":
        part["annotations"] = []
    return {"status": "completed", **item, "content": [part]}


def _read_item(item: Any, path: str, find: Callable[[str], Item | None]) -> Item:
    if not isinstance(item, dict):
        raise InvalidRequest(f"`{path}` must be an object, not {kind_of(item)}.", param=path)
    kind = item.get("type") or ("message" if "role" in item else "item_reference" if "id" in item else None)
    match kind:
        case "message":
            return _read_message(item, path)
        case "function_call":
            arguments = item.get("arguments", "{}")
            if not isinstance(arguments, str):
                raise InvalidRequest(f"`{path}.arguments` must be a string of JSON.", param=f"{path}.arguments")
            names = {name: _name(item, name, path) for name in ("call_id", "name")}
            return {"type": kind, **names, "arguments": arguments, "id": _id_of(item, "fc")}
        case "function_call_output":
            output = item.get("output")
            _text_of(output, "tool", f"{path}.output")
            call_id = _name(item, "call_id", path)
            return {"type": kind, "call_id": call_id, "output": output, "id": _id_of(item, "fco")}
        case "reasoning":
            content = _reasoning_of(item.get("content"), f"{path}.content")
            return {"type": kind, "summary": [], "content": content, "id": _id_of(item, "rs")}
        case "item_reference":
            named = _name(item, "id", path)
            if (found := find(named)) is None:
                told = f"There is no kept item {named!r}. Send the item itself, or store the response that it is of."
                raise InvalidRequest(told, param=f"{path}.id")
            return found
    named = f"an item of type {kind[:40]!r}" if isinstance(kind, str) else "no item"
    told = (
        f"`{path}` is {named}; this server reads message, function_call, function_call_output, reasoning and "
        "item_reference."
    )
    raise InvalidRequest(told, param=f"{path}.type")


def _reasoning_of(content: Any, path: str) -> list[Item]:
    parts = [] if content is None else content
    if not isinstance(parts, list) or not all(
        isinstance(each, dict) and isinstance(each.get("text"), str) for each in parts
    ):
        raise InvalidRequest(f"`{path}` must be a list of parts with `text`.", param=path)
    return [{"type": "reasoning_text", "text": each["text"]} for each in parts]


def _read_message(item: Item, path: str) -> Item:
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES or role == "tool":
        raise InvalidRequest(f"`{path}.role` must be user, assistant, system or developer.", param=f"{path}.role")
    _text_of(item.get("content"), role, f"{path}.content")
    return {"type": "message", "role": role, "content": item["content"], "id": _id_of(item, "msg")}


def _text_of(content: Any, role: str, path: str = "input") -> str:
    return read_content(content, path, role, _PARTS)


def _name(item: Item, field: str, path: str) -> str:
    value = item.get(field)
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        told = f"`{path}.{field}` must be a string of 1 to 256 characters."
        raise InvalidRequest(told, param=f"{path}.{field}")
    return value


def _id_of(item: Item, prefix: str) -> str:
    given = item.get("id")
    return given if isinstance(given, str) and 0 < len(given) <= 256 else _new_id(prefix)


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex}"
