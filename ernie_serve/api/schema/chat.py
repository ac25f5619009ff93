"""The fields of /v1/chat/completions.

Knows how a conversation is to be answered. Knows nothing of templates.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from ernie_serve.api.schema.accepted import Boolean, Integer, Prediction, Texts
from ernie_serve.api.schema.fields import INT31, TextRequest, documented
from ernie_serve.api.schema.messages import MESSAGES
from ernie_serve.api.schema.tools import TOOL_CHOICE, TOOLS, ToolUse, read_tool_use, read_tools
from ernie_serve.api.schema.validation import kind_of
from ernie_serve.errors import InvalidRequest

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

TEMPLATE_VARIABLES = frozenset({"enable_thinking", "thinking", "think_mode", "reasoning_effort"})
"""Template variables that a client may set."""


class ConversationFields(BaseModel):
    """What a conversation adds to its messages, wherever these are turned into a prompt."""

    add_generation_prompt: Boolean | None = None
    continue_final_message: Boolean | None = None
    chat_template_kwargs: Annotated[Any, documented({"type": "object", "additionalProperties": True})] = None
    reasoning_effort: ReasoningEffort | None = None
    tools: Annotated[Any, documented(TOOLS)] = None
    tool_choice: Annotated[Any, documented(TOOL_CHOICE)] = None
    parallel_tool_calls: Boolean | None = None

    def require_one_ending(self) -> None:
        """Raise `InvalidRequest` where a prompt cannot both go on with the last message and begin a new one."""
        if self.add_generation_prompt and self.continue_final_message:
            told = "`continue_final_message` and `add_generation_prompt` exclude each other. Set one of them to false."
            raise InvalidRequest(told, param="continue_final_message")

    @property
    def tool_use(self) -> ToolUse:
        """What may be called. Raises `InvalidRequest`."""
        return read_tool_use(read_tools(self.tools), self.tool_choice, self.parallel_tool_calls)

    @property
    def template_variables(self) -> dict[str, str | int | float | bool | None]:
        """What the template is told beside the messages. Raises `InvalidRequest` for what a client may not set."""
        given = self.chat_template_kwargs
        if given is None:
            given = {}
        if not isinstance(given, dict):
            told = f"`chat_template_kwargs` must be an object, not {kind_of(given)}."
            raise InvalidRequest(told, param="chat_template_kwargs")
        variables: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            variables["reasoning_effort"] = self.reasoning_effort
            variables["enable_thinking"] = variables["thinking"] = self.reasoning_effort != "none"
        for name, value in given.items():
            if name not in TEMPLATE_VARIABLES:
                known = ", ".join(sorted(TEMPLATE_VARIABLES))
                told = f"`chat_template_kwargs` may set {known}; not {name[:40]!r}."
                raise InvalidRequest(told, param="chat_template_kwargs")
            if isinstance(value, dict | list):
                told = f"`chat_template_kwargs.{name}` must be a string, a number, true, false or null."
                raise InvalidRequest(told, param="chat_template_kwargs")
            variables[name] = value
        return variables


class ReasoningFields(BaseModel):
    """How long an answer may think, under our name or vLLM's."""

    max_reasoning_tokens: Annotated[Integer, Field(ge=0, le=INT31)] | None = None
    thinking_token_budget: Annotated[Integer, Field(ge=0, le=INT31)] | None = None

    @property
    def reasoning_tokens(self) -> int | None:
        """The most tokens of reasoning. Raises `InvalidRequest` where two different numbers are given."""
        given = {self.max_reasoning_tokens, self.thinking_token_budget} - {None}
        if len(given) > 1:
            told = "`max_reasoning_tokens` and `thinking_token_budget` say different things. Send one of them."
            raise InvalidRequest(told, param="thinking_token_budget")
        return next(iter(given), None)


class ChatRequest(TextRequest, ConversationFields, ReasoningFields):
    """A request for the next turn of a conversation."""

    messages: Annotated[Any, WithJsonSchema(MESSAGES)]
    max_completion_tokens: Annotated[Integer, Field(ge=0)] | None = None
    logprobs: Boolean | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    modalities: Texts | None = None
    prediction: Prediction | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
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
        if self.top_logprobs and not self.logprobs:
            told = "`top_logprobs` needs `logprobs`. Set `logprobs` to true, or leave both out."
            raise InvalidRequest(told, param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            told = "`max_tokens` and `max_completion_tokens` say different things. Send the second alone."
            raise InvalidRequest(told, param="max_tokens")
        if self.echo:
            raise InvalidRequest("`echo` is not supported for chat. Leave it out.", param="echo")
        if self.prompt_logprobs is not None and self.stream:
            told = "`prompt_logprobs` cannot be streamed. Leave out `stream`."
            raise InvalidRequest(told, param="prompt_logprobs")
        if self.modalities is not None and set(self.modalities) != {"text"}:
            told = '`modalities` must be ["text"]: this model writes text alone.'
            raise InvalidRequest(told, param="modalities")
        if self.verbosity in ("low", "high"):
            told = "`verbosity` is not supported by this server beyond 'medium'. Say in the messages how much you want."
            raise InvalidRequest(told, param="verbosity")
        self.require_one_ending()
