"""From the fields of a request to what the engine is told.

Knows the checkpoint's defaults and the limits on lengths. Knows nothing of text.
"""

import secrets
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from ernie_serve.api.schema.fields import (
    TextRequest,
    read_allowed_token_ids,
    read_bad_words,
    read_logit_bias,
    read_stop_token_ids,
)
from ernie_serve.api.services import Services
from ernie_serve.errors import ContextLengthExceeded, InvalidRequest
from ernie_serve.messages import SamplingParams
from ernie_serve.text.tokenizer import Tokenizer

LEAST_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken, as at 0: no other has a chance that can be told from none."""

Value = TypeVar("Value")


class Sampling:
    """How all choices of one request are sampled; they differ in seed and in the room their prompts leave."""

    def __init__(
        self,
        fields: TextRequest,
        services: Services,
        *,
        chat: bool,
        prompt_param: str,
        default_max: int | None,
        constraints: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Read the fields once. `default_max` bounds an answer whose length the client leaves open, `None` by room.

        `constraints` are further parameters: what grammar binds the answer, and how long it may reason.
        What neither the client nor the checkpoint states is OpenAI's default.
        """
        self._services = services
        self._prompt_param = prompt_param
        self._default_max = default_max
        self._param, self._wanted = fields.wanted_tokens
        self._seed = fields.seed
        self._min_tokens = fields.min_tokens or 0
        defaults, vocab_size = services.defaults, services.tokenizer.vocab_size
        temperature = first_given(fields.temperature, defaults.temperature, 1.0)
        top_p = first_given(fields.top_p, defaults.top_p, 1.0)
        top_k = max(0, first_given(fields.top_k, defaults.top_k, 0))
        self._params = SamplingParams(
            max_tokens=0,
            seed=0,
            min_tokens=self._min_tokens,
            temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
            top_p=top_p or 1.0,
            top_k=top_k if top_p else 1,  # the smallest set of tokens that holds no mass is the likeliest one
            min_p=fields.min_p or 0.0,
            repetition_penalty=first_given(fields.repetition_penalty, defaults.repetition_penalty, 1.0),
            presence_penalty=fields.presence_penalty or 0.0,
            frequency_penalty=fields.frequency_penalty or 0.0,
            logit_bias=read_logit_bias(fields.logit_bias, vocab_size),
            stop_token_ids=stop_ids(
                read_stop_token_ids(fields.stop_token_ids, vocab_size),
                () if fields.ignore_eos else defaults.stop_ids(chat=chat),
            ),
            logprobs=fields.num_logprobs if fields.num_made == (fields.n or 1) else fields.num_logprobs or 0,
            prompt_logprobs=fields.scored_prompt,
            allowed_token_ids=read_allowed_token_ids(fields.allowed_token_ids, vocab_size),
            bad_words=bad_word_ids(services.tokenizer, read_bad_words(fields.bad_words)),
            **constraints,
        )

    def for_choice(self, choice: int, prompt_length: int) -> SamplingParams:
        """The parameters of one choice of a prompt. Raises `ContextLengthExceeded` or `InvalidRequest`."""
        seed = secrets.randbits(63) if self._seed is None else (self._seed + choice) % 2**63
        max_tokens = self._max_tokens(prompt_length)
        if self._params.prompt_logprobs is not None:
            max_tokens = max(max_tokens, 1)  # a prompt is scored on the way to its first token
        return msgspec.structs.replace(self._params, seed=seed, max_tokens=max_tokens)

    def _max_tokens(self, prompt_length: int) -> int:
        """What the client asked for, if it fits; else as much as fits, if the client left it open."""
        longest, room = self._services.max_answer_tokens, self._services.context_length - prompt_length
        if room < (0 if self._wanted == 0 else 1):
            raise self._too_long(f"{prompt_length} tokens. Shorten the prompt.")
        if self._wanted is None:
            max_tokens = min(room, longest, self._default_max or longest)
        elif self._wanted > longest:
            told = f"`{self._param}` is {self._wanted}, but this server's answers have at most {longest} tokens."
            raise InvalidRequest(f"{told} Ask for fewer, or leave it out.", param=self._param)
        elif self._wanted > room:
            more = f"`{self._param}` asks for {self._wanted} more"
            raise self._too_long(f"{prompt_length} tokens and {more}. Shorten the prompt, or ask for at most {room}.")
        else:
            max_tokens = self._wanted
        if self._min_tokens > max_tokens:
            told = (
                f"`min_tokens` is {self._min_tokens}, but this answer has at most {max_tokens} tokens. Ask for fewer."
            )
            raise InvalidRequest(told, param="min_tokens")
        return max_tokens

    def _too_long(self, length: str) -> ContextLengthExceeded:
        """Clients that then shorten a conversation, or turn to another model, know it by OpenAI's words at its head."""
        context = self._services.context_length
        told = (
            f"This model's maximum context length is {context} tokens, prompt and answer together, but the prompt has"
        )
        return ContextLengthExceeded(f"{told} {length}", param=self._prompt_param)


def first_given(client: Value | None, checkpoint: Value | None, otherwise: Value) -> Value:
    """What the client says, or else the checkpoint, or else the default; zero is something said."""
    return next(value for value in (client, checkpoint, otherwise) if value is not None)


def stop_ids(*sources: Sequence[int]) -> tuple[int, ...]:
    """All ids, each once, in order."""
    return tuple(dict.fromkeys(token_id for source in sources for token_id in source))


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as it is spelled at the beginning of a text and behind a space."""
    spelled = [text for word in words for text in (word, f" {word.lstrip()}")]
    return tuple(dict.fromkeys(tuple(ids) for text in spelled if (ids := tokenizer.encode(text))))


def truncated(ids: list[int], fields: TextRequest, context_length: int) -> list[int]:
    """The end of a prompt, as long as `truncate_prompt_tokens` says; -1 leaves just the room that was asked for."""
    limit = fields.truncate_prompt_tokens
    if limit is None:
        return ids
    if limit == 0:
        told = "`truncate_prompt_tokens` must be -1 or at least 1: a prompt needs a token."
        raise InvalidRequest(told, param="truncate_prompt_tokens")
    if limit < 0:
        limit = max(1, context_length - (fields.wanted_tokens[1] or 1))
    return ids[-limit:]
