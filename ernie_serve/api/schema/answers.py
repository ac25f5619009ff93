"""What the endpoints answer, for the API's own description.

Knows shapes alone: answers themselves are written by each endpoint's format, and held to these by the tests.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answered(BaseModel):
    """An answer, which may have more fields than are told here."""

    model_config = ConfigDict(extra="allow")


class Problem(Answered):
    """What went wrong: OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ProblemAnswer(Answered):
    """OpenAI's error body."""

    error: Problem


class PromptDetails(Answered):
    """How much of the prompts was read from the prefix cache."""

    cached_tokens: int


class CompletionDetails(Answered):
    """How much of the answers was reasoning."""

    reasoning_tokens: int


class Usage(Answered):
    """Tokens read and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class CompletionChoice(Answered):
    """One continued text."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class Completion(Answered):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class CalledFunction(Answered):
    """A function's name, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Answered):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Answered):
    """What the assistant says, with its reasoning and its calls where there are any."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = []


class ChatChoice(Answered):
    """One next turn."""

    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Answered):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ResponseObject(Answered):
    """The answer of /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class DeletedResponse(Answered):
    """A response that is kept no longer."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemList(Answered):
    """A page of the items that a response was asked for with."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool


class InputTokens(Answered):
    """What a response would read."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class ModelObject(Answered):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Answered):
    """All of them."""

    object: Literal["list"]
    data: list[ModelObject]


class Tokenized(Answered):
    """A prompt's ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answered):
    """The text of ids."""

    prompt: str


class Version(Answered):
    """The release that answers."""

    version: str


class Health(Answered):
    """Whether the server answers, and its engine's state."""
