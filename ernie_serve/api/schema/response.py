"""The fields of /v1/responses.

Knows how Responses spells what chat spells otherwise. Knows nothing of items or events.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ernie_serve.api.schema.accepted import Boolean, Integer, Text, Texts
from ernie_serve.api.schema.chat import ConversationFields, ReasoningEffort, ReasoningFields
from ernie_serve.api.schema.fields import TextRequest, documented
from ernie_serve.api.schema.tools import ToolUse, read_function, read_tool_use, read_tools
from ernie_serve.api.schema.validation import kind_of
from ernie_serve.errors import InvalidRequest

LOGPROBS = "message.output_text.logprobs"
INCLUDED = frozenset({LOGPROBS, "reasoning.encrypted_content"})
"""What may be asked for beside the answer. Reasoning is told in the open, so there is nothing to encrypt."""

_FLAT_TOOLS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"enum": ["function"]}, "name": {"type": "string"}, "parameters": {"type": "object"}},
        "required": ["type", "name"],
    },
}
_INPUT = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "role": {"enum": ["user", "assistant", "system", "developer"]},
                    "content": {"type": "string"},
                },
                "required": ["role", "content"],
            },
        },
    ]
}


class Reasoning(BaseModel):
    """How much is to be thought. Summaries are not made; the reasoning itself is told."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextConfig(BaseModel):
    """What the answer's text looks like."""

    format: Any = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseRequest(TextRequest, ConversationFields, ReasoningFields):
    """A request for the next items of a conversation."""

    input: Annotated[Any, documented(_INPUT)] = None
    instructions: Text | None = None
    max_output_tokens: Annotated[Integer, Field(ge=1)] | None = None
    max_tool_calls: Annotated[Integer, Field(ge=1)] | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    include: Texts | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[Any, documented(_FLAT_TOOLS)] = None
    previous_response_id: Annotated[Text, Field(max_length=256)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: Boolean | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted beside each token."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        """The longest answer the client allows, and the field that says so."""
        return "max_output_tokens", self.max_output_tokens

    @property
    def template_variables(self) -> dict[str, str | int | float | bool | None]:
        """What the template is told beside the messages: an effort of `reasoning` is one of chat."""
        if self.reasoning is None or self.reasoning.effort is None:
            return super().template_variables
        return self.model_copy(update={"reasoning_effort": self.reasoning.effort, "reasoning": None}).template_variables

    @property
    def tool_use(self) -> ToolUse:
        """What may be called: flat tools, in chat's form. Raises `InvalidRequest`."""
        return read_tool_use(read_tools(_nested(self.tools)), self.tool_choice, self.parallel_tool_calls)

    def require_supported(self) -> None:
        """Raise `InvalidRequest` for what is spelled otherwise here, or not offered."""
        for name, instead in (("max_tokens", "max_output_tokens"), ("response_format", "text.format")):
            if getattr(self, name) is not None:
                told = f"`{name}` is spelled `{instead}` in Responses. Send that."
                raise InvalidRequest(told, param=name)
        offered = {
            "n": self.n in (None, 1),
            "background": not self.background,
            "conversation": self.conversation is None,
            "prompt": self.prompt is None,
            "context_management": self.context_management is None,
            "truncation": self.truncation != "auto",
            "prompt_logprobs": self.prompt_logprobs is None,
            "return_token_ids": not self.return_token_ids,
            "stream_options.continuous_usage_stats": not self.wants_usage_in_chunks,
            "text.verbosity": self.text is None or self.text.verbosity in (None, "medium"),
        }
        for name, is_offered in offered.items():
            if not is_offered:
                told = f"`{name}` is not supported by this server with this value. Leave it out."
                raise InvalidRequest(told, param=name)
        if unknown := [name for name in self.include or () if name not in INCLUDED]:
            told = f"`include` may hold {', '.join(sorted(INCLUDED))}; not {unknown[0][:80]!r}."
            raise InvalidRequest(told, param="include")
        if self.top_logprobs and LOGPROBS not in (self.include or ()):
            raise InvalidRequest(f"`top_logprobs` needs `include` to hold {LOGPROBS!r}.", param="top_logprobs")
        self.require_one_ending()


def _nested(tools: Any) -> Any:
    """Flat tools in chat's nested form; what is not of that form is left for chat's reader to refuse."""
    if not isinstance(tools, list):
        return tools
    return [_nest(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _nest(tool: Any, path: str) -> Any:
    if not isinstance(tool, dict):
        raise InvalidRequest(f"`{path}` must be an object, not {kind_of(tool)}.", param=path)
    if tool.get("type") != "function" or isinstance(tool.get("function"), dict):
        return tool
    return {"type": "function", "function": read_function(tool, path)}


def flat_tools(use: ToolUse) -> list[dict[str, Any]]:
    """The tools as Responses tells them."""
    empty = {"description": None, "parameters": None, "strict": False}
    return [{"type": "function", **empty, **tool["function"]} for tool in use.tools]
