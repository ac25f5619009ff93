"""How many tokens of prompts a step may compute, so that answers that stream keep their pace.

Knows counts of tokens and seconds of steps. Knows nothing of requests, blocks or what a token costs: it learns that.

A step of streams alone takes about so long whatever is done; what a piece of prompt adds grows with its tokens. So the
piece that fits is the last one, times the time there is for it, over the time it took.
"""


class Pace:
    """Sizes pieces of prompts so that a step takes about `seconds`, or twice as long as its streams alone.

    The longer of the two holds, so that prompts move where streams fill a step by themselves. 0 seconds: nothing is
    limited.
    """

    def __init__(self, seconds: float = 0.0, first_tokens: int = 16) -> None:
        self.seconds = seconds
        self._tokens = float(first_tokens)  # of the piece that would fit
        self._alone = 0.0  # seconds of a step of streams alone, of late

    def prompt_tokens(self, num_streams: int) -> int | None:
        """Tokens of prompts that may go into a step beside so many streams; None: as many as one likes."""
        return int(self._tokens) if self.seconds and num_streams else None

    def took(self, num_streams: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a step: its streams, each with one token, the tokens of prompts beside them, and its duration."""
        if not num_prompt_tokens:
            self._alone += (seconds - self._alone) * (_NEWEST if self._alone else 1.0)
            return
        limit = max(self.seconds, 2 * self._alone)
        if num_prompt_tokens < self._tokens / _CHANGE and seconds <= limit:
            return  # the end of a prompt: a token of few costs more than one of many
        alone = min(self._alone, _MOST * seconds) if num_streams else 0.0
        fitting = num_prompt_tokens * (limit - alone) / max(seconds - alone, _INSTANT)
        self._tokens = max(1.0, min(max(fitting, self._tokens / _CHANGE), self._tokens * _CHANGE))


_NEWEST = 0.3  # weight of the last step among those before
_CHANGE = 2.0  # most that a piece grows or shrinks from one step to the next
_MOST = 0.9  # of a step's time that is put down to its streams
_INSTANT = 1e-6
