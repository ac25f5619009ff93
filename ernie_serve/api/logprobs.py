"""Log-probabilities as OpenAI writes them, in each endpoint's own way.

Knows tokens as text and bytes. Knows nothing of streams.
"""

from collections.abc import Sequence
from typing import Any

from ernie_serve.api.choice_text import Placed
from ernie_serve.text.tokenizer import Tokenizer

LEAST = -9999.0
"""What stands for minus infinity, which JSON cannot say."""


def chat_logprobs(tokenizer: Tokenizer, placed: Sequence[Placed]) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""

    def told(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": max(logprob, LEAST),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = [
        {
            **told(token.token_id, token.logprob),
            "top_logprobs": [told(token_id, logprob) for token_id, logprob in token.top],
        }
        for _, token in placed
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, placed: Sequence[Placed]) -> dict[str, Any]:
    """The `logprobs` of a completion's choice; the chosen token is always among the likeliest ones told."""

    def name(token_id: int) -> str:
        spelled = tokenizer.token_bytes(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:  # part of a character: told by its bytes, so that no two parts look alike
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    return {
        "tokens": [name(token.token_id) for _, token in placed],
        "token_logprobs": [max(token.logprob, LEAST) for _, token in placed],
        "top_logprobs": [
            {name(token_id): max(logprob, LEAST) for token_id, logprob in [(token.token_id, token.logprob), *token.top]}
            for _, token in placed
        ],
        "text_offset": [place for place, _ in placed],
    }
