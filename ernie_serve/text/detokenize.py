"""Token ids that arrive bit by bit, as text that never breaks a character.

Knows the bytes of tokens. Knows nothing about stop strings, reasoning or HTTP.
"""

import codecs
from collections.abc import Sequence

from ernie_serve.text.tokenizer import Tokenizer


class Detokenizer:
    """The running text of one answer. All pushes and the flush together are the whole text, however it was cut.

    A prompt may end in the middle of a character (a hand-made list of ids can); the first tokens then complete it, so
    the answer continues from the prompt's last bytes. The cost is linear in the bytes pushed.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token_id in reversed(prompt_ids):
            if len(tail) >= 4:  # the longest character
                break
            tail = b"".join(tokenizer.iter_bytes([token_id], skip_special_tokens=skip_special_tokens)) + tail
        self._decoder.decode(tail[-4:])

    def push(self, ids: Sequence[int]) -> str:
        """The characters that these ids complete."""
        pieces = self._tokenizer.iter_bytes(ids, skip_special_tokens=self._skip_special_tokens)
        return self._decoder.decode(b"".join(pieces))

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD. Nothing is pushed after it."""
        return self._decoder.decode(b"", final=True)
