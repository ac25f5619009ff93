"""From the tokens of one choice to the text that may be shown, with the log-probabilities that belong to it.

Knows detokenizing and stop strings, and holds back what either may still change. Knows nothing of engines or HTTP.
Who tells reasoning and calls from content (`telling.py`) reads what this class shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ernie_serve.messages import EngineOutput, TokenLogprobs
from ernie_serve.text.detokenize import Detokenizer
from ernie_serve.text.stop import StopChecker
from ernie_serve.text.tokenizer import Tokenizer

Placed = tuple[int, TokenLogprobs]
"""A token's log-probabilities, and where its text begins in the answer, in characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How the ids of an answer become its text. Stop strings are looked for behind the first `min_tokens` tokens.

    Ids in `hidden_ids` have no text, whatever they are. With `score_stop` the token that ends an answer has its
    log-probability told, though no text: harnesses cut off the last of a scored prompt's, whatever it was.
    """

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    logprobs: bool = False
    score_stop: bool = False
    hidden_ids: frozenset[int] = frozenset()


class ChoiceText:
    """The running text of one choice. However the outputs cut the tokens, the shown pieces add up to the same text."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], options: TextOptions) -> None:
        self._options = options
        self._detokenizer = Detokenizer(tokenizer, prompt_ids, skip_special_tokens=options.skip_special_tokens)
        self._stop = StopChecker(options.stops, include_stop=options.include_stop)
        self._by_token = options.logprobs or (options.min_tokens > 0 and bool(options.stops))
        self._num_tokens = 0
        self._num_chars = 0
        self._num_shown = 0
        self._waiting: list[Placed] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._stop.stopped is not None

    def push(self, output: EngineOutput) -> tuple[str, list[Placed]]:
        """What an output lets us show: text, and the log-probabilities of the tokens whose text has begun.

        A token that ended the request is no part of the text unless stops are included.
        """
        ids, logprobs = output.token_ids, output.logprobs
        if output.stop_token_id is not None and not self._options.include_stop:
            ids, logprobs = ids[:-1], logprobs[: len(ids) - 1]
        text = self._push_one_by_one(ids, logprobs) if self._by_token else self._show(self._text_of(ids))
        if self._options.score_stop and len(logprobs) < len(output.logprobs):
            self._waiting.append((self._num_chars, output.logprobs[-1]))
        if output.finish_reason is not None and not self.stopped:
            text += self._show(self._detokenizer.flush())
            text += self._stop.flush()
        self._num_shown += len(text)
        return text, self._ready(everything=output.finish_reason is not None and not self.stopped)

    def _push_one_by_one(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> str:
        text = ""
        for index, token_id in enumerate(ids):
            piece = self._text_of((token_id,))
            self._num_tokens += 1
            if logprobs:
                self._waiting.append((self._num_chars, logprobs[index]))
            self._num_chars += len(piece)
            text += piece if self._num_tokens <= self._options.min_tokens else self._show(piece)
            if self.stopped:
                break
        return text

    def _text_of(self, ids: Sequence[int]) -> str:
        hidden = self._options.hidden_ids
        return self._detokenizer.push([i for i in ids if i not in hidden] if hidden else ids)

    def _show(self, text: str) -> str:
        return self._stop.push(text) if text and self._options.stops else text

    def _ready(self, *, everything: bool) -> list[Placed]:
        """The waiting log-probabilities that may be shown; those behind a stop string never are."""
        if not self._waiting:
            return []
        count = sum(everything or place < self._num_shown for place, _ in self._waiting)
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        return ready
