"""The fields of /v1/completions.

Knows the four shapes of a prompt. Knows nothing of tokenizers beyond the size of the vocabulary.
"""

from typing import Annotated, Any

from pydantic import Field

from ernie_serve.api.schema.fields import Boolean, Integer, TextRequest, require_token_ids
from ernie_serve.api.schema.validation import kind_of
from ernie_serve.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(TextRequest):
    """A request to continue one or several texts."""

    prompt: Any
    best_of: Annotated[Integer, Field(ge=1)] | None = None
    echo: Boolean | None = None
    logprobs: Annotated[Integer, Field(ge=0, le=5)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted beside each token."""
        return self.logprobs

    def require_supported(self) -> None:
        """Raise `InvalidRequest` for fields that are only refused together with others."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            told = f"`best_of` must equal `n` ({self.n or 1}): this server does not make answers to choose from."
            raise InvalidRequest(told, param="best_of")
        if self.echo and self.logprobs is not None:
            told = "`echo` together with `logprobs` is not supported by this server. Leave one of them out."
            raise InvalidRequest(told, param="echo")


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
