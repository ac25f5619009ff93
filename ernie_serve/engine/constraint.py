"""What one request's next token may be, beyond its likelihood: its grammar, its word lists, its reasoning budget.

Knows token ids, bits and a matcher. Knows nothing about tensors, text or who else runs. It follows the tokens of the
output as they are told, each once; computing them again after a preemption tells it nothing.
"""

from collections.abc import Iterable

import numpy as np

from ernie_serve.grammar.matcher import Matcher
from ernie_serve.messages import ErrorCode, SamplingParams

_FAILED = "The engine failed on this request's grammar."

Bits = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class Constraint:
    """One request's. `error` and its code say why it cannot go on, `has_ended` that its grammar lets nothing follow."""

    def __init__(self, sampling: SamplingParams, num_ids: int, matcher: Matcher | None = None) -> None:
        self._sampling = sampling
        self._num_ids = num_ids
        self._matcher = matcher
        self._is_bound = sampling.grammar_after_token_id is None  # to the grammar
        self._is_reasoning = sampling.max_reasoning_tokens is not None
        self._forced: list[int] = []  # still to come, before anything else
        self._output: list[int] = []
        self._allowed = _bits_of(sampling.allowed_token_ids, num_ids) if sampling.allowed_token_ids else None
        self.has_ended = False
        self.error = ""
        self.error_code: ErrorCode = ""
        self._force_if_due()

    @property
    def matcher(self) -> Matcher | None:
        """Whose mask the next token needs, if any."""
        return self._matcher if self._is_bound and not self._forced else None

    @property
    def is_idle(self) -> bool:
        """Whether any token may come next, so that no mask is needed."""
        waiting = self._matcher is not None and not self._is_bound
        return not (self._forced or self.matcher or waiting or self._sampling.bad_words or self._allowed is not None)

    def advance(self, token_id: int) -> None:
        """The output goes on with this token. An end of the text that the grammar allowed is not told further."""
        sampling = self._sampling
        self._output.append(token_id)
        if self._forced:
            self._forced.pop(0)
        elif self._matcher is not None and self._is_bound:
            self._advance_grammar(token_id)
        self._is_bound = self._is_bound or token_id == sampling.grammar_after_token_id
        if token_id == sampling.reasoning_end_token_id:
            self._is_reasoning = False
        self._force_if_due()

    def finish_mask(self, bits: Bits) -> None:
        """Turn a row that holds its matcher's mask, or nothing, into what the sampler may choose from.

        Where that is no token at all, `error` says so, and some token is allowed that the engine will drop.
        """
        if self._forced:
            bits[:] = _bits_of(self._forced[:1], self._num_ids)
            return
        if (matcher := self.matcher) is not None:
            self.error = _FAILED if matcher.error else ""
            self._let_stop(bits, may_end=_has(bits, self._num_ids))
        else:
            bits[:] = _all(self._num_ids)
            if self._matcher is not None or len(self._output) < self._sampling.min_tokens:
                _clear(bits, self._sampling.stop_token_ids)
        _clear(bits, range(self._num_ids, 8 * len(bits)))
        if self._allowed is not None:
            bits &= self._allowed
        _clear(bits, self._banned_words())
        if not bits.any():
            if not self.error:
                self.error, self.error_code = "The request's constraints leave no token to go on with.", "no_token_left"
            bits[0] = 1

    def _advance_grammar(self, token_id: int) -> None:
        assert self._matcher is not None, "a grammar to advance"
        if token_id in self._sampling.stop_token_ids:
            self.has_ended = True
            return
        self._matcher.advance(token_id)
        if self._matcher.error:
            self.error = _FAILED
        self.has_ended = self._matcher.has_ended

    def _force_if_due(self) -> None:
        """The budget is spent: the end of reasoning comes next, whatever the model would say."""
        sampling, budget = self._sampling, self._sampling.max_reasoning_tokens
        if not self._is_reasoning or budget is None or sampling.reasoning_end_token_id is None:
            return
        if len(self._output) >= budget:
            self._forced = list(sampling.reasoning_end_forced_ids or (sampling.reasoning_end_token_id,))
            self._is_reasoning = False

    def _let_stop(self, bits: Bits, *, may_end: bool) -> None:
        """Stop tokens where the grammar may end, and nowhere else; before `min_tokens` only where it must."""
        stop_ids = self._sampling.stop_token_ids
        _clear(bits, (self._num_ids, *stop_ids))
        if may_end and (len(self._output) >= self._sampling.min_tokens or not bits.any()):
            _set(bits, (i for i in stop_ids if i < self._num_ids))

    def _banned_words(self) -> Iterable[int]:
        """The last token of each bad word that stands in the output but for that."""
        for word in self._sampling.bad_words:
            start = len(word) - 1
            if start <= len(self._output) and list(word[:-1]) == self._output[len(self._output) - start :]:
                yield word[-1]


def _all(num_ids: int) -> Bits:
    size = (num_ids + 32) // 32 * 4
    return np.full(size, 255, np.uint8)


def _bits_of(ids: Iterable[int], num_ids: int) -> Bits:
    bits = np.zeros_like(_all(num_ids))
    _set(bits, (i for i in ids if 0 <= i < num_ids))
    return bits


def _has(bits: Bits, index: int) -> bool:
    return bool(bits[index >> 3] >> (index & 7) & 1)


def _set(bits: Bits, ids: Iterable[int]) -> None:
    for i in ids:
        bits[i >> 3] |= 1 << (i & 7)


def _clear(bits: Bits, ids: Iterable[int]) -> None:
    for i in ids:
        if 0 <= i < 8 * len(bits):
            bits[i >> 3] &= 255 ^ (1 << (i & 7))
