"""How many tokens of prompts a step may compute, so that answers that stream keep their pace.

Knows counts of tokens and seconds of steps. Knows nothing of requests, blocks or what a token costs: it learns that.

A step of streams alone takes about so long whatever is done; what a piece of prompt adds grows with its tokens. So the
piece that fits is the time there is for it over the time of a token. Prompts may come without a pause, and then no step
shows any more what its streams take alone: one stream more than when it was last seen is taken to cost what a token
does.
"""


class Pace:
    """Sizes pieces of prompts so that a step takes about `seconds`, or twice as long as its streams alone.

    The longer of the two holds, so that prompts move where streams fill a step by themselves. 0 seconds: nothing is
    limited.
    """

    def __init__(self, seconds: float = 0.0, first_tokens: int = 16) -> None:
        self.seconds = seconds
        self._first_tokens = first_tokens
        self._token = 0.0  # seconds of a token of a prompt; 0: not known
        self._alone = 0.0  # seconds of a step of `_streams` and no prompt, of late
        self._streams = 0

    def prompt_tokens(self, num_streams: int) -> int | None:
        """Tokens of prompts that may go into a step beside so many streams; None: as many as one likes."""
        if not self.seconds or not num_streams:
            return None
        if not self._token:
            return self._first_tokens
        room = self._limit(num_streams) - self._alone_of(num_streams)
        return max(1, int(room / self._token + _ROUNDING))

    def took(self, num_streams: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a step: its streams, each with one token, the tokens of prompts beside them, and its duration."""
        if not num_prompt_tokens:
            known = self._alone_of(num_streams) if self._streams else seconds
            self._alone, self._streams = known + (seconds - known) * _NEWEST, num_streams
            return
        fitting = self.prompt_tokens(num_streams) or 0
        if num_prompt_tokens < fitting / _CHANGE and seconds <= self._limit(num_streams):
            return  # the end of a prompt: a token of few costs more than one of many
        if self._streams:
            alone = min(self._alone_of(num_streams), _MOST * seconds)
            token = (seconds - alone) / num_prompt_tokens
        else:
            token = seconds / (num_streams + num_prompt_tokens)
        least, most = (self._token / _CHANGE, self._token * _CHANGE) if self._token else (_INSTANT, token)
        self._token = max(least, min(token, most))

    def _alone_of(self, num_streams: int) -> float:
        """Seconds that so many streams take alone: as they did, and for each that is new as much as for a token."""
        guess = self._alone + (num_streams - self._streams) * self._token
        return max(guess, self._alone * num_streams / self._streams) if num_streams < self._streams else guess

    def _limit(self, num_streams: int) -> float:
        return max(self.seconds, 2 * self._alone_of(num_streams))


_NEWEST = 0.3  # weight of the last step among those before
_CHANGE = 2.0  # most that a token's time grows or shrinks from one step to the next
_MOST = 0.9  # of a step's time that is put down to its streams
_INSTANT = 1e-6
_ROUNDING = 1e-6  # 19.9999999 tokens are 20
