"""Carries out a plan: one pass of the network over its tokens, one token for each row that wants one.

Knows the model, the KV cache and the sampler. Knows nothing of why a plan is what it is.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ernie_serve.messages import NO_TOKEN, PlanRow, Sampled, StepPlan, TokenLogprobs, TokenMasks
from ernie_serve.model.ernie import Ernie
from ernie_serve.worker.batch import BatchBuilder, num_scored
from ernie_serve.worker.card import current
from ernie_serve.worker.graphs import DecodeGraphs, Device, Flight
from ernie_serve.worker.logprobs import scores_of
from ernie_serve.worker.sampler import Sampler

LOOK_SECONDS = 0.05
"""Time between two questions whether a step is still wanted."""


class Runner:
    """Owns the KV cache: for each layer `num_blocks` blocks of `block_size` tokens, keys and values apart.

    What it remembers of a request (its block table, its token counts) is bounded, and rebuilt from the plan if it is
    forgotten or no longer true: a request may come back after a preemption, at any start and in other blocks.

    With a `device` that records, steps of nothing but plain decodes are recordings, which `launch` starts and
    `collect` waits for; `max_model_len` is the longest text they meet.
    """

    def __init__(
        self,
        model: Ernie,
        num_blocks: int,
        block_size: int,
        *,
        max_num_seqs: int = 256,
        num_valid_ids: int | None = None,
        cache_dtype: torch.dtype | None = None,
        device: Device | None = None,
        max_model_len: int | None = None,
    ) -> None:
        """`cache_dtype` is the arithmetic's own unless given; torch.int8 keeps 8 bits with scales."""
        weight, config = model.norm.weight, model.config
        dtype = cache_dtype or weight.dtype
        self.model = model
        self._where = weight.device
        self.cache = [
            model.kernels.empty_cache(
                num_blocks, block_size, config.num_key_value_heads, config.head_dim, dtype, weight.device
            )
            for _ in range(config.num_hidden_layers)
        ]
        self._batches = BatchBuilder(block_size, weight.device, max_requests=2 * max_num_seqs)
        draw = getattr(model.kernels, "sample", None)  # those of a GPU have it
        self._sampler = Sampler(max_requests=2 * max_num_seqs, num_valid_ids=num_valid_ids, draw=draw)
        self._num_valid_ids = num_valid_ids
        self.graphs = (
            DecodeGraphs(
                model,
                self.cache,
                block_size,
                device,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len or num_blocks * block_size,
                num_valid_ids=num_valid_ids,
            )
            if device is not None
            else None
        )

    def launch(self, plan: StepPlan) -> Flight | None:
        """Start a step without waiting for it; `None` where it has to be executed."""
        if self.graphs is None:
            return None
        with current(self._where):
            return self.graphs.launch(plan)

    def collect(self, flight: Flight) -> list[Sampled]:
        """The tokens of a step that was launched, in the order of its rows."""
        with current(self._where):
            return [Sampled(*each) for each in zip(flight.request_ids, flight.tokens(), strict=True)]

    @torch.inference_mode()
    def execute(
        self,
        plan: StepPlan,
        masks: Callable[[], TokenMasks] | None = None,
        is_wanted: Callable[[], bool] | None = None,
    ) -> list[Sampled]:
        """Run a step; the new tokens, in the order of the rows that want one, then what only scores a prompt.

        `masks` is asked for once the network has been started: it may wait for them. `is_wanted` is asked between
        layers, every `LOOK_SECONDS` at most; when it says no, the step is broken off and nothing comes of it.
        """
        with current(self._where):
            return self._execute(plan, masks, is_wanted)

    def _execute(
        self, plan: StepPlan, masks: Callable[[], TokenMasks] | None, is_wanted: Callable[[], bool] | None
    ) -> list[Sampled]:
        batch = self._batches.build(plan)
        cache = self._cache_while(is_wanted) if is_wanted else self.cache
        try:
            logits = self.model(batch.ids, batch.layout, cache, batch.logit_indices, batch.ends)
        except _BrokenOff:
            return []
        rows = batch.sampled_rows
        sampled = self._sampler.sample(logits[: len(rows)], rows, masks() if masks else None) if rows else []
        return self._with_scores(sampled, logits[len(rows) :], batch.scored_rows) if batch.scored_rows else sampled

    def _cache_while(self, is_wanted: Callable[[], bool]) -> Iterator[tuple[Tensor, Tensor]]:
        """The cache layer by layer, as long as somebody waits for the step."""
        looked_at = time.monotonic()
        for layer in self.cache:
            if time.monotonic() - looked_at > LOOK_SECONDS:
                if not is_wanted():
                    raise _BrokenOff
                looked_at = time.monotonic()
            yield layer

    def _with_scores(self, sampled: list[Sampled], logits: Tensor, rows: list[PlanRow]) -> list[Sampled]:
        """Add the logprobs of prompt tokens; `logits` has one row for each, in order."""
        by_id = {each.request_id: each for each in sampled}
        start = 0
        for row in rows:
            stop = start + num_scored(row)
            scores = self._score(logits[start:stop], row)
            token = by_id.get(row.request_id)
            by_id[row.request_id] = Sampled(
                row.request_id, token.token_id if token else NO_TOKEN, token.logprobs if token else None, scores
            )
            start = stop
        return list(by_id.values())

    def _score(self, logits: Tensor, row: PlanRow) -> list[TokenLogprobs]:
        first = row.start + 1
        targets = row.prompt_token_ids[first : first + len(logits)]
        return scores_of(logits, targets, row.sampling.prompt_logprobs or 0, self._num_valid_ids)


class _BrokenOff(Exception):
    """Ends a step that nobody waits for."""
