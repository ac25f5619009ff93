"""A conversation as messages, and the text that the chat template makes of it, cut where the model's own words begin.

Knows the family's tags. Must say exactly what `chat_template.jinja` says; a test compares the two.
"""

import json
from dataclasses import dataclass, field
from typing import Any

Tool = dict[str, Any]
OPEN_THINK = "<think>\n"
NO_THINK = "<think>\n\n</think>\n\n"


@dataclass
class Message:
    """One turn. `think` is None where the assistant answers without thinking aloud."""

    role: str
    content: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    think: str | None = None

    def published(self) -> dict[str, Any]:
        """The OpenAI form of this message."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.think is not None:
            message["reasoning_content"] = self.think
        if self.calls:
            message["tool_calls"] = [
                {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
                for n, (name, arguments) in enumerate(self.calls)
            ]
        return message


@dataclass
class Dialogue:
    """Messages, tools, and whether thinking is on."""

    messages: list[Message]
    tools: list[Tool] = field(default_factory=list)
    thinking: bool = False

    def pieces(self) -> list[tuple[str, bool]]:
        """(text, is the model's own) in order. Each of the model's turns ends with its end-of-turn token."""
        pieces = [(head(self.messages, self.tools, self.thinking), False)]
        last_user = max((n for n, m in enumerate(self.messages) if m.role == "user"), default=-1)
        for n, message in enumerate(self.messages):
            if message.role == "assistant":
                pieces += own_turn(message, keep_thought=n > last_user, thinking=self.thinking)
            elif message.role != "system":
                pieces.append((other_turn(message), False))
        return pieces

    def document(self) -> list[tuple[str, bool]]:
        """`pieces` up to the model's last word."""
        pieces = self.pieces()
        return pieces[:-1] if pieces[-1] == ("\n\n", False) else pieces

    def prompt(self) -> str:
        """The whole text with the generation prompt, as the server sends it."""
        turns = "".join(text for text, _ in self.pieces())
        return turns + "<|im_start|>assistant\n" + (OPEN_THINK if self.thinking else NO_THINK)


def head(messages: list[Message], tools: list[Tool], thinking: bool) -> str:
    """The system turn, which is always there."""
    text = "<|im_start|>system\n"
    system = "\n\n".join(m.content for m in messages if m.role == "system")
    if system:
        text += f"<system_setting>\n{system}\n</system_setting>\n\n"
    text += f"<global_setting>\nthink_mode={thinking}\n</global_setting>"
    if tools:
        text += f"\n\n<tool_list>\n{as_json(tools)}\n</tool_list>"
    return text + "<|im_end|>\n\n"


def other_turn(message: Message) -> str:
    """A turn of the user or of a tool."""
    if message.role == "tool":
        return f"<|im_start|>tool\n<tool_response>\n{message.content}\n</tool_response><|im_end|>\n\n"
    return f"<|im_start|>user\n{message.content}<|im_end|>\n\n"


def own_turn(message: Message, keep_thought: bool, thinking: bool) -> list[tuple[str, bool]]:
    """A turn of the assistant. History keeps a thought only after the last user message."""
    opening, answer = "<|im_start|>assistant\n", reply(message)
    if keep_thought and thinking and message.think is not None:
        return [
            (opening + OPEN_THINK, False),
            (f"{message.think}\n</think>\n\n{answer}<|im_end|>", True),
            ("\n\n", False),
        ]
    if keep_thought and not thinking:
        return [(opening + NO_THINK, False), (answer + "<|im_end|>", True), ("\n\n", False)]
    return [(opening, False), (answer + "<|im_end|>", True), ("\n\n", False)]


def reply(message: Message) -> str:
    """What the assistant says after thinking: words, calls, or both."""
    words = f"<response>\n{message.content}\n</response>\n" if message.content or not message.calls else ""
    return words + "".join(
        f'\n<tool_call>\n{{"name": {as_json(name)}, "arguments": {as_json(arguments)}}}\n</tool_call>\n'
        for name, arguments in message.calls
    )


def as_json(value: Any) -> str:
    """JSON as the family writes it: a space after commas and colons, no ASCII escapes."""
    return json.dumps(value, ensure_ascii=False)
