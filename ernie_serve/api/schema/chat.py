"""The fields of /v1/chat/completions.

Knows roles and content parts. Knows nothing of templates.
"""

from typing import Annotated, Any

from pydantic import Field

from ernie_serve.api.schema.fields import Boolean, Integer, TextRequest
from ernie_serve.api.schema.validation import kind_of
from ernie_serve.errors import InvalidRequest

MAX_MESSAGES = 2048
MAX_PARTS = 1024
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Who speaks, as clients say it and as templates know it."""


class ChatRequest(TextRequest):
    """A request for the next turn of a conversation."""

    messages: Any
    max_completion_tokens: Annotated[Integer, Field(ge=0)] | None = None
    logprobs: Boolean | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    add_generation_prompt: Boolean | None = None
    echo: Boolean | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted beside each token."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        """The longest answer the client allows, and the field that says so: the new name before the old."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    def require_supported(self) -> None:
        """Raise `InvalidRequest` for fields that are only refused together with others."""
        if self.top_logprobs is not None and not self.logprobs:
            told = "`top_logprobs` needs `logprobs`. Set `logprobs` to true, or leave both out."
            raise InvalidRequest(told, param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            told = "`max_tokens` and `max_completion_tokens` say different things. Send the second alone."
            raise InvalidRequest(told, param="max_tokens")
        if self.echo:
            raise InvalidRequest("`echo` is not supported for chat. Leave it out.", param="echo")


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """The conversation as templates read it: a role, a content that is always a string, perhaps a name.

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
    if role in ("tool", "function"):
        told = f"`{path}.role`: {role} messages are not supported by this server. Say it in a user message."
        raise InvalidRequest(told, param=f"{path}.role")
    if not isinstance(role, str) or role not in ROLES:
        told = f"`{path}.role` must be one of {', '.join(ROLES)}."
        raise InvalidRequest(told, param=f"{path}.role")
    for field in ("tool_calls", "function_call", "audio", "refusal"):
        if message.get(field):
            told = f"`{path}.{field}` is not supported by this server. Leave it out."
            raise InvalidRequest(told, param=f"{path}.{field}")
    read: dict[str, Any] = {
        "role": ROLES[role],
        "content": _read_content(message.get("content"), f"{path}.content", role),
    }
    name = message.get("name")
    if name is not None:
        if not isinstance(name, str) or len(name) > 256:
            raise InvalidRequest(f"`{path}.name` must be a string of at most 256 characters.", param=f"{path}.name")
        read["name"] = name
    return read


def _read_content(content: Any, path: str, role: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list) or not 0 < len(content) <= MAX_PARTS:
        told = f"`{path}` must be a string or a list of 1 to {MAX_PARTS} text parts"
        raise InvalidRequest(f"{told}{'' if isinstance(content, list) else f', not {kind_of(content)}'}.", param=path)
    return "\n".join(_read_part(part, f"{path}[{index}]") for index, part in enumerate(content))


def _read_part(part: Any, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        named = f"a part of type {kind[:40]!r}" if isinstance(kind, str) else "no content part"
        raise InvalidRequest(f"`{path}` is {named}; this model reads parts of type 'text' alone.", param=f"{path}.type")
    if not isinstance(part.get("text"), str):
        raise InvalidRequest(f"`{path}.text` must be a string.", param=f"{path}.text")
    text: str = part["text"]
    return text
