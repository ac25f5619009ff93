"""Log-probabilities of tokens that were chosen or given, and of the likeliest beside them.

Knows logits. Knows nothing of how tokens are chosen. All are the model's own, before any parameter of a request: shares
among all ids of the vocabulary, also those that pad it, which are never listed beside a token.
"""

import torch
from torch import Tensor

from ernie_serve.messages import TokenLogprobs

# R rows of logits, V token ids, padding included


def logprobs_of(
    logits: Tensor, token_ids: list[int], wanted: list[int | None], num_valid_ids: int | None = None
) -> dict[int, TokenLogprobs]:
    """For the rows of `logits` [R, V] that want any, by row: of its token, and of as many of the likeliest.

    Ids from `num_valid_ids` on are padding of the vocabulary.
    """
    at = [i for i, count in enumerate(wanted) if count is not None]
    if not at:
        return {}
    logs = rows_at(logits, at).log_softmax(-1)
    chosen = logs.gather(-1, torch.tensor([[token_ids[i]] for i in at], device=logs.device))[:, 0].tolist()
    listed = logs[:, :num_valid_ids]
    values, ids = listed.topk(min(max(wanted[i] or 0 for i in at), listed.shape[1]))
    tops = [
        list(zip(some_ids[: wanted[i]], some_values[: wanted[i]], strict=True))
        for i, some_ids, some_values in zip(at, ids.tolist(), values.tolist(), strict=True)
    ]
    return {i: TokenLogprobs(token_ids[i], logprob, top) for i, logprob, top in zip(at, chosen, tops, strict=True)}


def scores_of(
    logits: Tensor, token_ids: list[int], num_top: int, num_valid_ids: int | None = None
) -> list[TokenLogprobs]:
    """Logprobs of `token_ids`, one for each row of `logits` [R, V] of any precision, a few rows at a time."""
    scores: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), ROWS_AT_ONCE):
        some = token_ids[start : start + ROWS_AT_ONCE]
        part = logprobs_of(logits[start : start + len(some)].float(), some, [num_top] * len(some), num_valid_ids)
        scores += [part[i] for i in range(len(some))]
    return scores


ROWS_AT_ONCE = 64
"""Rows of a prompt that are scored at a time: it bounds the memory of float32 copies."""


def rows_at(x: Tensor, indices: list[int]) -> Tensor:
    """The rows of `x` at `indices`; `x` itself when that is all of them."""
    return x if len(indices) == x.shape[0] else x[torch.tensor(indices, device=x.device)]
