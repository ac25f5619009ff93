"""Chooses the next tokens of a whole batch from their logits.

Knows logits, sampling parameters and the texts so far. Knows nothing about the network, blocks or the schedule.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ernie_serve.messages import NO_TOKEN, PlanRow, Sampled, SamplingParams, TokenMasks
from ernie_serve.worker.bounds import Bounds
from ernie_serve.worker.logprobs import logprobs_of, rows_at
from ernie_serve.worker.recent import Recent

# R rows that want a token, V token ids


Draw = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Chooses tokens as `kernels/triton/sampling.py` says."""


class Sampler:
    """One token a row.

    The order is: logit bias, `min_tokens`, penalties, mask, temperature, min_p, top_k, top_p, chance. Chance is one
    number a token, a function of the request's seed and of how many tokens it has put out, and nothing else: neither
    the batch nor a preemption changes it. That number picks from the cumulative distribution in the order of token
    ids. Ids from `num_valid_ids` on are padding of the vocabulary and never chosen. Token counts for penalties are
    kept for up to `max_requests` requests, and rebuilt from the plan when forgotten; a request id never stands for
    two texts.
    """

    def __init__(self, max_requests: int, num_valid_ids: int | None = None, draw: Draw | None = None) -> None:
        """`draw` chooses on the device, where its kernels can."""
        self.num_valid_ids = num_valid_ids
        self._draw = draw
        self._histories: Recent[_History] = Recent(max_requests)

    def sample(self, logits: Tensor, rows: list[PlanRow], masks: TokenMasks | None = None) -> list[Sampled]:
        """A token for every row of `logits` [R, V], in order; a row with a mask yields one that the mask allows.

        A mask knows of `min_tokens`, and where it lets a text end before that there is no other way on. A row whose
        logits are no numbers, all or one of them, yields none. A device tells of them only where logprobs are wanted,
        which are read anyway.
        """
        logits = logits.float()
        places = {row.request_id: i for i, row in enumerate(rows)}
        valid = logits[:, : self.num_valid_ids]
        bounds = Bounds(masks, places, valid.shape[1]) if masks else None
        scores = self._adjusted(valid, rows, bounds)
        if bounds and self._draw:
            scores, bounds = bounds.applied_to_all(scores), None
        token_ids = _drawn(self._draw, scores, rows) if self._draw else _choose(scores, rows, bounds)
        logprobs = logprobs_of(logits, token_ids, [row.sampling.logprobs for row in rows], self.num_valid_ids)
        failed = [i for i, told in logprobs.items() if not math.isfinite(told.logprob)]
        if not self._draw:
            failed += _wrong_rows(valid, bounds)
        for i in failed:
            token_ids[i] = NO_TOKEN
        return [
            Sampled(row.request_id, token_id, logprobs.get(i))
            for i, (row, token_id) in enumerate(zip(rows, token_ids, strict=True))
        ]

    def _adjusted(self, logits: Tensor, rows: list[PlanRow], bounds: Bounds | None) -> Tensor:
        """`logits` after bias, `min_tokens` and penalties; a copy if anything changes."""
        V = logits.shape[1]
        bias, banned = _Edits(V), _Edits(V)
        penalised: list[tuple[int, PlanRow]] = []
        for i, row in enumerate(rows):
            p = row.sampling
            if p.logit_bias:
                bias.add(i, list(p.logit_bias), list(p.logit_bias.values()))
            if len(row.output_token_ids) < p.min_tokens and p.stop_token_ids and not (bounds and i in bounds):
                banned.add(i, p.stop_token_ids, [0.0] * len(p.stop_token_ids))
            if p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty:
                penalised.append((i, row))
        if not (bias or banned or penalised):
            return logits
        scores = logits.clone()
        if bias:
            bias.apply(scores, lambda old, value: old + value)
        if banned:
            banned.apply(scores, lambda old, value: torch.full_like(old, float("-inf")))
        if penalised:
            self._penalise(scores, penalised)
        return scores

    def _penalise(self, scores: Tensor, rows: list[tuple[int, PlanRow]]) -> None:
        """Repetition counts prompt and output; presence and frequency count the output only."""
        repetition, additive = _Edits(scores.shape[1]), _Edits(scores.shape[1])
        for i, row in rows:
            ids, counts = self._history(row).read()
            p = row.sampling
            if p.repetition_penalty != 1:
                repetition.add(i, ids, np.full(len(ids), p.repetition_penalty))
            if p.presence_penalty or p.frequency_penalty:
                out = counts > 0
                additive.add(i, ids[out], p.frequency_penalty * counts[out] + p.presence_penalty)
        if repetition:
            repetition.apply(scores, lambda old, value: torch.where(old > 0, old / value, old * value))
        if additive:
            additive.apply(scores, lambda old, value: old - value)

    def _history(self, row: PlanRow) -> "_History":
        history = self._histories.get(row.request_id)
        if history is None or history.num_output > len(row.output_token_ids):
            history = _History(row.prompt_token_ids)
            self._histories.put(row.request_id, history)
        history.follow(row.output_token_ids)
        return history


_CANDIDATES = (256, 4096)  # how many of the likeliest tokens top_p looks at, and then, before it looks at all

_Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def uniform(seed: int, count: int) -> float:
    """The number in [0, 1) that decides token `count` of a request: 53 bits of two rounds of splitmix64."""
    return (_splitmix64(_splitmix64(seed) + count) >> 11) * 2.0**-53


def _splitmix64(state: int) -> int:
    """Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


_MASK = (1 << 64) - 1


def _drawn(draw: Draw, scores: Tensor, rows: list[PlanRow]) -> list[int]:
    """A token id for every row of `scores` [R, V], chosen on their device, all at once."""
    params = [row.sampling for row in rows]
    points = [uniform(row.sampling.seed, len(row.output_token_ids)) for row in rows]
    settings = [(u, p.temperature, p.top_p, p.min_p) for u, p in zip(points, params, strict=True)]
    where = scores.device
    return draw(
        scores,
        torch.tensor(settings, dtype=torch.float64, device=where),
        torch.tensor([p.top_k for p in params], dtype=torch.int32, device=where),
        scores.shape[1],
    ).tolist()


def _choose(scores: Tensor, rows: list[PlanRow], bounds: Bounds | None) -> list[int]:
    """A token id for every row of `scores` [R, V] on a CPU, greedily or by chance."""
    params = [row.sampling for row in rows]
    greedy = [i for i, p in enumerate(params) if p.temperature == 0]
    ids = _likeliest(scores, greedy, bounds)
    if len(greedy) == len(rows):
        return ids
    uniforms = [uniform(row.sampling.seed, len(row.output_token_ids)) for row in rows]
    for part in _parts(params, scores, bounds):
        some = rows_at(scores, part)
        if bounds and part[0] in bounds:
            some = bounds.applied(some, part)
        found = _pick(some, [params[i] for i in part], [uniforms[i] for i in part])
        for i, token_id in zip(part, found.tolist(), strict=True):
            ids[i] = token_id
    return ids


def _wrong_rows(logits: Tensor, bounds: Bounds | None) -> list[int]:
    """The rows of `logits` [R, V] of which something that may be chosen is no number."""
    suspected = np.flatnonzero(~np.isfinite(logits.numpy().max(-1))).tolist()
    return [
        i
        for i in suspected
        if not (bounds and i in bounds and math.isfinite(bounds.applied(logits[i : i + 1], [i]).max()))
    ]


def _likeliest(scores: Tensor, rows: list[int], bounds: Bounds | None) -> list[int]:
    """The ids of the highest scores in `rows`, of equals the lowest, and any id in the others."""
    ids, numbers = [0] * scores.shape[0], scores.numpy()  # whose argmax is many times as fast as a tensor's
    for i in rows:
        ids[i] = int(numbers[i].argmax())
        if bounds and not bounds.allows(i, ids[i]):
            ids[i] = int(bounds.applied(scores[i : i + 1], [i]).numpy().argmax())
    return ids


def _parts(params: list[SamplingParams], scores: Tensor, bounds: Bounds | None) -> Iterator[list[int]]:
    """The rows that chance decides, a few at a time: so few that what is made of them stays in a core's cache.

    Those that top_k or top_p limit are apart from those that are free, and those with a mask from those without.
    """
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for i, p in enumerate(params):
        if p.temperature:
            kinds.setdefault((_is_limited(p, scores.shape[1]), bounds is not None and i in bounds), []).append(i)
    for rows in kinds.values():
        for start in range(0, len(rows), _AT_ONCE):
            yield rows[start : start + _AT_ONCE]


_AT_ONCE = 2


def _is_limited(params: SamplingParams, num_ids: int) -> bool:
    return 0 < params.top_k < num_ids or params.top_p < 1


def _pick(scores: Tensor, params: list[SamplingParams], uniforms: list[float]) -> Tensor:
    """Token ids [R] drawn from `scores` [R, V] at the given points of their cumulative distributions."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    V = scores.shape[1]
    x = scores - scores.amax(-1, keepdim=True)
    if any(p.temperature != 1 for p in params):
        x /= column([p.temperature for p in params]).float()
    torch.threshold_(x, -78.0, -80.0)  # a chance below 1e-34 is none: what would come out denormal is slow to add, and
    weights = torch.threshold_(x.exp(), 1e-34, 0.0)  # the power of minus infinity is six times as slow as of others
    min_p = column([p.min_p for p in params]) if any(p.min_p > 0 for p in params) else None
    if min_p is not None:
        weights = weights.where(weights >= min_p, 0.0)
    points = column(uniforms)
    if not any(_is_limited(p, V) for p in params):
        return _at(points, weights)
    top_k = torch.tensor([p.top_k if 0 < p.top_k < V else V for p in params], device=x.device)[:, None]
    top_p = column([p.top_p for p in params])
    most = max(p.top_k if p.top_k < V else 0 for p in params)
    for num in (max(count, most + 1) for count in _CANDIDATES):
        if num < V:
            ids, is_settled = _pick_among(x, weights, top_k, top_p, points, num)
            if is_settled:
                return ids
    return _at(points, weights.where(_inside(x, weights, top_k, top_p), 0.0))


def _at(points: Tensor, weights: Tensor) -> Tensor:
    """Where the running sum of `weights` [R, n] first exceeds `points` [R, 1] of the whole: [R]."""
    running = weights.cumsum(-1, dtype=torch.float64)
    total = running[:, -1:]
    targets = torch.minimum(points * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(running, targets, right=True)[:, 0].clamp_(max=weights.shape[1] - 1)


def _pick_among(
    x: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, points: Tensor, num: int
) -> tuple[Tensor, bool]:
    """`_pick` from the `num` likeliest tokens, and whether that settles it for all rows.

    It does where top_k and top_p end before the last of them, and no token outside may equal the last one inside.
    """
    values, ids = x.topk(num)
    ids, by_id = ids.sort(-1)
    values, by_value = values.gather(-1, by_id).sort(
        dim=-1, descending=True, stable=True
    )  # of equals the lower id first
    ids = ids.gather(-1, by_value)
    shares = weights.gather(-1, ids)
    kept = _kept(shares, weights, top_k, top_p)
    last = values.gather(-1, kept.sum(-1, keepdim=True) - 1)
    if not bool((last > values[:, -1:]).all()):
        return ids[:, 0], False
    ids, by_id = ids.sort(-1)
    place = _at(points, shares.where(kept, 0.0).gather(-1, by_id))
    return ids.gather(-1, place[:, None])[:, 0], True


def _inside(x: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which of all tokens top_k and then top_p leave: [R, V]. Sorts the whole vocabulary."""
    order = x.sort(dim=-1, descending=True, stable=True).indices
    kept = _kept(weights.gather(-1, order), weights, top_k, top_p)
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def _kept(shares: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which of the likeliest tokens, whose weights are `shares` [R, n], are left: the first always is."""
    rank = torch.arange(shares.shape[1], device=shares.device)
    shares = shares.double().where(rank < top_k, 0.0)
    total = torch.where(top_k < weights.shape[1], shares.sum(-1, keepdim=True), weights.sum(-1, keepdim=True).double())
    before = shares.cumsum(-1) - shares
    return (rank == 0) | ((shares > 0) & ((before < top_p * total) | (top_p >= 1)))


class _Edits:
    """Values for single places of a score matrix, gathered row by row and written at once."""

    def __init__(self, num_ids: int) -> None:
        self.num_ids = num_ids
        self.rows: list[_Array] = []
        self.ids: list[_Array] = []
        self.values: list[_Array] = []

    def __bool__(self) -> bool:
        return bool(self.rows)

    def add(self, row: int, ids: "_Array | tuple[int, ...] | list[int]", values: "_Array | list[float]") -> None:
        """One value for each of `ids`, which are distinct; ids outside the vocabulary are left out."""
        at, new = np.asarray(ids, np.int64), np.asarray(values, np.float32)
        valid = (at >= 0) & (at < self.num_ids)
        self.ids.append(at[valid])
        self.values.append(new[valid])
        self.rows.append(np.full(int(valid.sum()), row, np.int64))

    def apply(self, scores: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace each place of `scores` by `change(old, value)`."""
        rows, ids, values = (
            torch.from_numpy(np.concatenate(parts)).to(scores.device) for parts in (self.rows, self.ids, self.values)
        )
        scores[rows, ids] = change(scores[rows, ids], values)


class _History:
    """The distinct tokens of one text, and how often each stands in its output."""

    def __init__(self, prompt_token_ids: list[int]) -> None:
        self.num_output = 0
        distinct = list(dict.fromkeys(prompt_token_ids))
        self._place = {token_id: i for i, token_id in enumerate(distinct)}
        self._ids = np.array([*distinct, *[0] * 64], np.int64)
        self._counts = np.zeros(len(self._ids), np.float32)

    def follow(self, output_token_ids: list[int]) -> None:
        """Count the tokens that are new since the last call."""
        for token_id in output_token_ids[self.num_output :]:
            place = self._place.setdefault(token_id, len(self._place))
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[place] = token_id
            self._counts[place] += 1
        self.num_output = len(output_token_ids)

    def read(
        self,
    ) -> tuple["np.ndarray[tuple[int, ...], np.dtype[np.int64]]", "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"]:
        """Token ids and their counts in the output."""
        n = len(self._place)
        return self._ids[:n], self._counts[:n]
