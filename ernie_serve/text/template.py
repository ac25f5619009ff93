"""Turns a conversation into the token ids that the checkpoint was trained to continue.

Knows the checkpoint's chat template. Knows nothing about engines, models or HTTP.

What a client sends (contents, names, roles, tool results, tool definitions, template variables) never becomes a control
token: see `guard.py`. Every other text is tokenised exactly as transformers' `apply_chat_template` does it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2

from ernie_serve.errors import CheckpointError, InvalidRequest
from ernie_serve.text.conversation import normalise_messages
from ernie_serve.text.guard import ControlGuard
from ernie_serve.text.sandbox import SandboxedTemplate
from ernie_serve.text.tokenizer import Tokenizer
from ernie_serve.text.tokenizer_files import read_json

Variable = str | int | float | bool | None

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
# A template that deletes or changes letters could put a control token's spelling together from harmless parts.
_REWRITES = frozenset(
    {"capitalize", "casefold", "format", "lower", "replace", "reverse", "striptags", "swapcase", "title", "upper"}
)
_NO_VARIABLES: Mapping[str, Variable] = MappingProxyType({})


class ChatTemplate:
    """A checkpoint's chat template, bound to its tokenizer. Safe to use from several threads at once."""

    def __init__(self, source: str, tokenizer: Tokenizer, *, max_steps: int = 1_000_000) -> None:
        """Compile. Raises `CheckpointError` when the template is not valid Jinja."""
        try:
            self._template = SandboxedTemplate(source, max_steps=max_steps)
        except (jinja2.TemplateError, RecursionError) as error:
            line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise CheckpointError(f"The chat template is not valid Jinja: {error}{line}.") from error
        self.source = source
        self.uses_tools: bool = "tools" in self._template.variables
        """Whether the template reads tool definitions; one that does not drops them silently."""
        self.thinks: bool = "<think>" in source
        """Whether the template frames reasoning in `<think>` tags."""
        self._role_tokens = tokenizer.role_tokens
        self._roles = _ROLES | self._template.constants
        operations = self._template.operations | self._template.constants
        rewritten = bool(operations & _REWRITES) or {"split", "join"} <= operations
        self._guard = ControlGuard(tokenizer, rewritten=rewritten, compared=self._roles)

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """Read chat_template.jinja, or the template in tokenizer_config.json; `None` where a checkpoint has neither.

        Of several named templates the one called "default" is taken. Raises `CheckpointError`, naming the file.
        """
        path = folder / "chat_template.jinja"
        if path.is_file():
            try:
                source = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from None
        else:
            path = folder / "tokenizer_config.json"
            named = read_json(path).get("chat_template")
            if isinstance(named, list):
                named = {item.get("name"): item.get("template") for item in named if isinstance(item, dict)}
                named = named.get("default")
            if named is None:
                return None
            if not isinstance(named, str):
                raise CheckpointError(f'{path}: "chat_template" must be a string or a list of named templates.')
            source = named
        try:
            return cls(source, tokenizer)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Variable] = _NO_VARIABLES,
    ) -> list[int]:
        """The prompt's token ids. Raises `InvalidRequest` when the template cannot render these messages."""
        guard = self._guard
        try:
            text = self._template.render(
                {
                    **self._role_tokens,
                    **{name: guard.mark(value) for name, value in variables.items()},
                    "messages": [self._marked(m) for m in normalise_messages(messages, split_reasoning=self.thinks)],
                    "tools": guard.mark(tools) if tools else None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.TemplateError as error:
            message = guard.reveal(str(error)).rstrip(".")
            raise InvalidRequest(f"The chat template refuses these messages: {message}.", param="messages") from error
        except Exception as error:  # whatever a template runs into is about the messages it was given
            raise InvalidRequest(
                f"The chat template cannot render these messages ({type(error).__name__}); check their fields and "
                "how deeply they are nested.",
                param="messages",
            ) from error
        return guard.encode(text)

    def _marked(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message with its strings marked. Templates compare roles, so a role they know stays as it is."""
        marked: dict[str, Any] = self._guard.mark(message)
        role = message.get("role")
        if isinstance(role, str):
            marked["role"] = role if role in self._roles else self._guard.mark_whole(role)
        return marked
