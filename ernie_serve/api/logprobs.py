"""Log-probabilities as OpenAI writes them, in each endpoint's own way.

Knows tokens as text and bytes. Knows nothing of streams. What is told of a token is JSON at once: as objects, those of
an answer would be a million, which to look through, to write and to free takes the interpreter for tenths of a second.
"""

from collections.abc import Sequence
from typing import Any

import orjson
from orjson import Fragment

from ernie_serve.api.choice_text import Placed
from ernie_serve.messages import TokenLogprobs
from ernie_serve.text.detokenize import Detokenizer
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
        _json(
            {
                **told(token.token_id, token.logprob),
                "top_logprobs": [told(token_id, logprob) for token_id, logprob in token.top],
            }
        )
        for _, token in placed
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, placed: Sequence[tuple[int, TokenLogprobs | None]], ids: Sequence[int] = ()
) -> dict[str, Any]:
    """The `logprobs` of a completion's choice; the chosen token is always among the likeliest ones told.

    The first token of a prompt has no log-probability: `null` stands for it, as OpenAI answers. `ids` name the
    tokens where one of them has none.
    """

    def name(token_id: int) -> str:
        spelled = tokenizer.token_bytes(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:  # part of a character: told by its bytes, so that no two parts look alike
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def likeliest(token: TokenLogprobs) -> dict[str, float]:
        pairs = [(token.token_id, token.logprob), *token.top]
        return {name(token_id): max(logprob, LEAST) for token_id, logprob in pairs}

    tokens = [token for _, token in placed]
    return {
        "tokens": [name(token.token_id if token else ids[at]) for at, token in enumerate(tokens)],
        "token_logprobs": [max(token.logprob, LEAST) if token else None for token in tokens],
        "top_logprobs": [_json(likeliest(token)) if token else None for token in tokens],
        "text_offset": [place for place, _ in placed],
    }


def placed_prompt(tokenizer: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool) -> list[int]:
    """Where the text of each token of a prompt begins, in characters."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    places: list[int] = []
    num_chars = 0
    for token_id in ids:
        places.append(num_chars)
        num_chars += len(detokenizer.push((token_id,)))
    return places


def prompt_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprobs | None]) -> list[Fragment | None]:
    """`prompt_logprobs` as vLLM writes them: for each token of the prompt, what it and the likeliest ones weigh."""

    def told(token: TokenLogprobs) -> dict[int, dict[str, Any]]:
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top, 1)}
        pairs = {token.token_id: token.logprob, **dict(token.top)}
        return {
            token_id: {
                "logprob": max(logprob, LEAST),
                "rank": ranks.get(token_id),
                "decoded_token": tokenizer.token_text(token_id),
            }
            for token_id, logprob in pairs.items()
        }

    return [_json(told(token)) if token else None for token in tokens]


def _json(value: dict[Any, Any]) -> Fragment:
    return Fragment(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS))
