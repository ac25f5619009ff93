"""Decides which requests compute how many tokens in the next step.

Knows block ids and token counts. Knows nothing about tensors, text or HTTP, and never meets a runner.

There is no prefill phase and no decode phase: each request has known tokens and computed tokens, and every step,
under one token budget, it catches up. A long prompt in chunks, a prefix found in the cache and a preempted request
that starts over differ only in where they stand.
"""

import logging
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Literal

from ernie_serve.engine.constraint import Constraint
from ernie_serve.engine.kv_cache import BlockPool
from ernie_serve.engine.pace import Pace
from ernie_serve.engine.prefixes import Prefixes
from ernie_serve.engine.request import Request
from ernie_serve.messages import (
    NO_TOKEN,
    EngineOutput,
    EngineRequest,
    EngineStats,
    ErrorCode,
    PlanRow,
    Sampled,
    StepPlan,
    TokenLogprobs,
)

logger = logging.getLogger(__name__)

_ORDER = attrgetter("order")


class Scheduler:
    """Keeps the requests in order of priority, then arrival; the first are served first, the last preempted first.

    Once `schedule` has put tokens into a plan they count as computed, so that the next plan can be made before the
    results of this one are in; `update` takes the results, and drops those of requests that have ended meanwhile.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        min_tokens_worth_waiting: int = 128,
        max_scored_tokens: int = 256,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if min(max_num_seqs, max_num_batched_tokens, max_model_len) < 1:
            raise ValueError("max_num_seqs, max_num_batched_tokens and max_model_len must be at least 1.")
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_scored_tokens = max_scored_tokens  # a step: each holds the logits of a whole vocabulary
        self._pace = pace or Pace()
        self._clock = clock  # tells when requests began; nothing is decided by it
        self._max_len = min(max_model_len, pool.num_blocks * pool.block_size)
        self._prefixes = Prefixes(pool, min_tokens_worth_waiting)
        self._requests: dict[str, Request] = {}
        self._waiting: list[Request] = []  # both in order
        self._running: list[Request] = []
        self._num_arrived = 0
        self._num_preempted = 0
        self._step = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    @property
    def stats(self) -> EngineStats:
        """The counts of now; `num_preempted` counts preemptions since the start."""
        return EngineStats(
            step=self._step,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_preempted=self._num_preempted,
            num_blocks=self.pool.num_blocks,
            blocks_used=self.pool.num_used,
            blocks_cached=self.pool.num_cached,
            blocks_free=self.pool.num_free,
        )

    def add(self, request: EngineRequest, constraint: Constraint | None = None) -> EngineOutput | None:
        """Queue a request. One that has nothing to compute, or never could, ends here with the output returned."""
        if reason := self._why_impossible(request):
            return EngineOutput(request_id=request.request_id, finish_reason="error", error=reason)
        if request.sampling.max_tokens < 1 and request.sampling.prompt_logprobs is None:
            return EngineOutput(request_id=request.request_id, finish_reason="length")
        self._num_arrived += 1
        arrived = Request.arriving(request, self._num_arrived, constraint)
        self._requests[arrived.request_id] = arrived
        insort(self._waiting, arrived, key=_ORDER)
        return None

    def abort(self, request_id: str) -> None:
        """Forget a request, waiting or running, also while it is in a plan. Unknown ids are ignored."""
        if request := self._requests.get(request_id):
            self._end(request)

    def schedule(self) -> StepPlan | None:
        """The next step, or None when there is nothing to do.

        Requests take their turn in order. Each leaves one token of the budget to every running request behind it,
        so a long prompt never holds up the others, and while answers stream the pieces of prompts are no larger than
        the pace allows. One that finds no block preempts from the far end; that only
        ever hits requests that have not had their turn yet, so no row is ever taken back.
        """
        budget = self.max_num_batched_tokens
        prompts = self._pace.prompt_tokens(sum(request.num_pending == 1 for request in self._running)) or budget
        scored = self.max_scored_tokens
        rows: list[PlanRow] = []
        place = 0  # those that run before it have had their turn
        passed = 0  # those that wait before it stay where they are
        admitting = True
        while budget > 0:
            if admitting and passed < len(self._waiting) and self._is_next(self._waiting[passed], place):
                outcome = self._admit(self._waiting[passed])
                admitting = outcome != "no room"
                passed += outcome == "later"
                if outcome != "started":
                    continue
            elif place == len(self._running) or not self._grow(self._running[place]):
                break  # one that cannot grow has preempted itself, and it was the last
            request = self._running[place]
            place += 1
            count = min(request.num_pending, max(1, budget - len(self._running) + place))
            if request.wants_scores:
                count = min(count, scored)
            if count > 1:
                count = min(count, prompts)
                prompts -= count
            if request.wants_scores:
                scored -= count
            if count:  # otherwise its next token is still under way, or others had what it needs of this step
                budget -= count
                rows.append(request.take_row(count))
        if not rows:
            return None
        self._step += 1
        return StepPlan(self._step, rows)

    def schedule_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step after `plan`, whose tokens are still under way, or None where they have to be known first.

        That is where somebody waits, where a token is bound by a constraint, where a request has more to compute, or
        where a block would have to be taken from others. A request that the token under way ends by its length is
        left out; one that it ends in another way is computed in vain, and `update` drops that.
        """
        going = [request for request in self._running if not request.is_last_under_way(self._max_len)]
        under_way = {row.request_id for row in plan.rows if row.wants_token and self._request_of(row)}
        if self._waiting or not going or not all(r.request_id in under_way and not r.num_pending for r in going):
            return None
        if any(request.constraint is not None for request in going):
            return None
        needed = [self.pool.blocks_for(request.num_tokens + 1) - len(request.block_ids) for request in going]
        if sum(needed) > self.pool.num_available:
            return None
        for request, count in zip(going, needed, strict=True):
            if count > 0:
                request.block_ids += self.pool.take(count)
        self._step += 1
        return StepPlan(self._step, [request.take_unknown() for request in going])

    def constraints(self, plan: StepPlan) -> dict[str, Constraint]:
        """What binds the tokens that a plan yields, by request; most requests are not bound."""
        requests = [request for row in plan.rows if row.wants_token and (request := self._request_of(row))]
        return {request.request_id: request.constraint for request in requests if request.constraint is not None}

    def has_any_of(self, plan: StepPlan) -> bool:
        """Whether any request of a plan is still there, so that its results matter."""
        return any(self._request_of(row) for row in plan.rows)

    def update(self, plan: StepPlan, sampled: Iterable[Sampled]) -> list[EngineOutput]:
        """Take the results of a plan: what was sampled for each row that wants a token or logprobs of its prompt."""
        yielded = {each.request_id: each for each in sampled}
        outputs = []
        for row in plan.rows:
            request = self._request_of(row)
            if request is None:
                continue
            stop = row.start + len(row.token_ids)
            if row.block_ids is request.block_ids:  # otherwise it was preempted since, and its blocks are gone
                self._prefixes.publish(request, stop)
            is_news = stop == request.num_tokens  # otherwise it has that token from before
            scores = _take_scores(request, row, yielded[row.request_id]) if row.wants_prompt_logprobs else []
            if is_news and row.wants_token:
                outputs.append(self._advance(request, yielded[row.request_id], scores))
            elif is_news or scores:
                outputs.append(self._tell_scores(request, scores, is_last=is_news))
            elif row.start == request.num_cached:  # it has begun, which is what its prompt is charged from
                outputs.append(
                    EngineOutput(
                        request_id=request.request_id,
                        num_cached_tokens=request.num_cached,
                        began_at=request.began_at,
                    )
                )
        return outputs

    def fail(self, plan: StepPlan, error: str) -> list[EngineOutput]:
        """End the requests of a plan that could not run."""
        failed = [request for row in plan.rows if (request := self._request_of(row))]
        return [self._fail(request, error) for request in failed]

    def took(self, plan: StepPlan, seconds: float) -> None:
        """Learn how long a plan ran."""
        num_streams = sum(len(row.token_ids) == 1 for row in plan.rows)
        self._pace.took(num_streams, plan.num_tokens - num_streams, seconds)

    def check(self) -> None:
        """Assert that the blocks the pool holds for us are those in our block tables; slow, for tests."""
        self.pool.check(request.block_ids for request in self._running)
        assert not any(request.block_ids for request in self._waiting), "a waiting request holds blocks"
        assert len(self._running) + len(self._waiting) == len(self._requests), "a request is lost or double"
        assert [*self._running] == sorted(self._running, key=_ORDER), "running is out of order"
        assert [*self._waiting] == sorted(self._waiting, key=_ORDER), "waiting is out of order"

    def _why_impossible(self, request: EngineRequest) -> str:
        num_tokens = len(request.prompt_token_ids)
        if request.request_id in self._requests:
            return f"A request with the id {request.request_id!r} is under way; ids must differ."
        if not num_tokens:
            return "The prompt has no tokens; it needs at least one."
        if num_tokens > self.max_model_len:
            return f"The prompt has {num_tokens} tokens; max_model_len is {self.max_model_len}."
        if num_tokens > self._max_len:
            return (
                f"The prompt has {num_tokens} tokens; the KV cache holds {self._max_len}. "
                "Shorten it, or give the KV cache more memory."
            )
        return ""

    def _is_next(self, request: Request, place: int) -> bool:
        return place == len(self._running) or request.order < self._running[place].order

    def _admit(self, request: Request) -> Literal["started", "later", "no room"]:
        """Start a waiting request, unless others are about to compute its beginning, or it does not fit."""
        if len(self._running) >= self.max_num_seqs and not self._outranks_last(request):
            return "no room"
        prefix = self._prefixes.find(request)
        if self._prefixes.is_worth_waiting(request, len(prefix)):
            return "later"
        needed = self.pool.blocks_for(request.num_tokens) - len(prefix)
        if not self._make_room(request, prefix, needed):
            return "no room"
        self.pool.share(prefix)
        request.start(prefix + self.pool.take(needed), len(prefix), self.pool.block_size)
        request.began_at = request.began_at or self._clock()
        self._prefixes.start(request)
        _remove(self._waiting, request)
        insort(self._running, request, key=_ORDER)
        return "started"

    def _make_room(self, request: Request, prefix: list[int], needed: int) -> bool:
        """A seat and all blocks for a newcomer, at the cost of those of a lower priority; whether it can start.

        One block is left to each that runs, so that the newcomer is not preempted as soon as they grow.
        """
        while (
            len(self._running) >= self.max_num_seqs
            or self.pool.num_available_beside(prefix) < needed + len(self._running)
        ):  # fmt: skip
            if not self._outranks_last(request):
                return False
            self._preempt(self._running[-1])
        return True

    def _outranks_last(self, request: Request) -> bool:
        return bool(self._running) and request.priority < self._running[-1].priority

    def _grow(self, request: Request) -> bool:
        """Get the blocks its known tokens need, from the last in order where none is left, in the end itself."""
        needed = self.pool.blocks_for(request.num_tokens) - len(request.block_ids)
        while needed > self.pool.num_available:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        if needed > 0:
            request.block_ids += self.pool.take(needed)
        return True

    def _request_of(self, row: PlanRow) -> Request | None:
        """The request a row was made for, unless it has ended, even if its id is in use again."""
        request = self._requests.get(row.request_id)
        return request if request is not None and row.output_token_ids is request.output_ids else None

    def _advance(self, request: Request, sampled: Sampled, scores: list[TokenLogprobs]) -> EngineOutput:
        constraint = request.constraint
        if constraint is not None and constraint.error:  # what was sampled is no answer
            return self._fail(request, constraint.error, constraint.error_code)
        if sampled.token_id == NO_TOKEN:
            logger.error("%s failed. %s", request.request_id, _NO_NUMBERS)
            return self._fail(request, _NO_NUMBERS)
        request.output_ids.append(sampled.token_id)
        if constraint is not None:
            constraint.advance(sampled.token_id)
        reason = request.finish_reason(self._max_len)
        if reason:
            self._end(request)
        return EngineOutput(
            request_id=request.request_id,
            token_ids=[sampled.token_id],
            logprobs=[sampled.logprobs] if sampled.logprobs else [],
            prompt_logprobs=scores,
            finish_reason=reason,
            stop_token_id=sampled.token_id if reason == "stop" and _is_stop(request, sampled.token_id) else None,
            num_cached_tokens=request.num_cached or 0,
            began_at=request.began_at if len(request.output_ids) == 1 else None,
            error=constraint.error if constraint is not None else "",
        )

    def _tell_scores(self, request: Request, scores: list[TokenLogprobs], *, is_last: bool) -> EngineOutput:
        """Logprobs of the prompt without a token; the end of a request that wants no token."""
        if is_last:
            self._end(request)
        return EngineOutput(
            request_id=request.request_id,
            prompt_logprobs=scores,
            finish_reason="length" if is_last else None,
            num_cached_tokens=request.num_cached or 0,
            began_at=request.began_at,
        )

    def _fail(self, request: Request, error: str, code: ErrorCode = "") -> EngineOutput:
        self._end(request)
        return EngineOutput(request_id=request.request_id, finish_reason="error", error=error, error_code=code)

    def _preempt(self, request: Request) -> None:
        """Back to its place in the queue, with what it has said and without its blocks."""
        _remove(self._running, request)
        self._drop_blocks(request)
        insort(self._waiting, request, key=_ORDER)
        self._num_preempted += 1

    def _end(self, request: Request) -> None:
        del self._requests[request.request_id]
        if not _remove(self._running, request):
            _remove(self._waiting, request)
        self._drop_blocks(request)

    def _drop_blocks(self, request: Request) -> None:
        self._prefixes.stop(request)
        self.pool.release(request.block_ids)
        request.restart()


_NO_NUMBERS = "The model's scores are no numbers: its weights are damaged, or too large for the dtype."


def _take_scores(request: Request, row: PlanRow, sampled: Sampled) -> list[TokenLogprobs]:
    """The logprobs of prompt tokens that are new; after a preemption some come again."""
    new = sampled.prompt_logprobs[max(0, request.num_scored - row.start) :]
    request.num_scored += len(new)
    return new


def _is_stop(request: Request, token_id: int) -> bool:
    return token_id in request.sampling.stop_token_ids


def _remove(requests: list[Request], request: Request) -> bool:
    """Take a request out of a list that is in order; whether it was there."""
    index = bisect_left(requests, request.order, key=_ORDER)
    if index == len(requests) or requests[index] is not request:
        return False
    del requests[index]
    return True
