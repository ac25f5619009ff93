"""The fields of /v1/completions.

Knows the four shapes of a prompt. Knows nothing of tokenizers beyond the size of the vocabulary.
"""

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from ernie_serve.api.schema.accepted import Boolean, Integer
from ernie_serve.api.schema.fields import TextRequest, require_token_ids
from ernie_serve.api.schema.validation import kind_of
from ernie_serve.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 16

_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PROMPT = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1},
    ]
}
"""The four shapes of a prompt, for the API's own description."""


class CompletionRequest(TextRequest):
    """A request to continue one or several texts."""

    prompt: Annotated[Any, WithJsonSchema(PROMPT)]
    best_of: Annotated[Integer, Field(ge=1)] | None = None
    echo: Boolean | None = None
    logprobs: Annotated[Integer, Field(ge=0, le=5)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted beside each token."""
        return self.logprobs

    def require_supported(self) -> None:
        """Raise `InvalidRequest` for fields that are only refused together with others."""
        if self.best_of is not None and self.best_of < (self.n or 1):
            told = f"`best_of` is {self.best_of}, but `n` asks for {self.n}. Make at least as many as you want."
            raise InvalidRequest(told, param="best_of")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            told = "`best_of` cannot be streamed: the best answer is known at the end. Leave one of them out."
            raise InvalidRequest(told, param="best_of")
        if self.prompt_logprobs is not None and self.stream:
            told = "`prompt_logprobs` cannot be streamed. Leave out `stream`."
            raise InvalidRequest(told, param="prompt_logprobs")

    @property
    def scored_prompt(self) -> int | None:
        """Alternatives wanted beside each token of the prompt: those of `logprobs` where the prompt is repeated."""
        if self.echo and self.logprobs is not None:
            return max(self.logprobs, self.prompt_logprobs or 0)
        return self.prompt_logprobs

    @property
    def num_made(self) -> int:
        """Answers made to each prompt, of which `n` are kept."""
        return self.best_of or self.n or 1


def read_prompts(prompt: Any, vocab_size: int, max_prompts: int) -> list[str | list[int]]:
    """`prompt`: a string, a list of strings, a list of token ids, or a list of such lists.

    Raises `InvalidRequest` for any other shape, for nothing at all, and for ids outside the vocabulary.
    """
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    elif isinstance(prompt, list) and prompt and not isinstance(prompt[0], str | list):
        prompts = [prompt]
    elif isinstance(prompt, list):
        prompts = prompt
    else:
        told = f"`prompt` must be a string, a list of strings or of token ids, or of such lists, not {kind_of(prompt)}."
        raise InvalidRequest(told, param="prompt")
    if not prompts:
        raise InvalidRequest("`prompt` is an empty list. Send at least one prompt.", param="prompt")
    if len(prompts) > max_prompts:
        told = f"`prompt` must hold at most {max_prompts} prompts, not {len(prompts)}. Send several requests."
        raise InvalidRequest(told, param="prompt")
    for each in prompts:
        if type(each) is not type(prompts[0]):
            raise InvalidRequest("`prompt` must hold either strings alone or lists of token ids alone.", param="prompt")
        if not each:
            raise InvalidRequest("`prompt` is empty. Send at least one character or token.", param="prompt")
        if isinstance(each, list):
            require_token_ids(each, vocab_size, "prompt")
    return prompts
