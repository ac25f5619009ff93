"""Steps that overlap: the engine plans a step before it has the tokens of the one before, and no text changes."""

import random

import pytest
from engine_fakes import FakeRunner, make_request, plain_loop
from msgspec.structs import replace

from ernie_serve.engine.core import EngineCore
from ernie_serve.engine.kv_cache import BlockPool
from ernie_serve.engine.scheduler import Scheduler
from ernie_serve.messages import UNKNOWN_TOKEN, Sampled, StepPlan


class OverlappingRunner(FakeRunner):
    """Computes a step as it is launched, and tells the tokens when it is asked; a token under way it knows itself."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.last: dict[str, int] = {}
        self.num_open = 0
        self.num_ahead = 0
        self.broken = False

    def launch(self, plan: StepPlan) -> list[Sampled] | None:
        if not all(len(row.token_ids) == 1 and row.wants_token for row in plan.rows):
            assert all(UNKNOWN_TOKEN not in row.token_ids for row in plan.rows)
            return None
        rows = []
        for row in plan.rows:
            if row.token_ids == [UNKNOWN_TOKEN]:
                self.num_ahead += 1
                token = self.last[row.request_id]
                row = replace(row, token_ids=[token], output_token_ids=[*row.output_token_ids, token])
            rows.append(row)
        sampled = self.execute(StepPlan(plan.step, rows))
        self.last = {each.request_id: each.token_id for each in sampled}
        self.num_open += 1
        assert self.num_open <= 2, "one step ahead, no more"
        return sampled

    def collect(self, flight: list[Sampled]) -> list[Sampled]:
        self.num_open -= 1
        if self.broken:
            raise RuntimeError("broken")
        return flight


def overlapping(num_blocks: int = 64, block_size: int = 4, **limits) -> EngineCore:
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 200} | limits
    pool = BlockPool(num_blocks, block_size, enable_prefix_caching=True)
    return EngineCore(Scheduler(pool, **limits), OverlappingRunner(num_blocks, block_size))


def test_the_step_after_is_started_before_the_tokens_are_read():
    core = overlapping()
    request = make_request("r", [1, 2, 3], max_tokens=6)
    core.add(request)
    tokens = []
    while core.has_work:
        tokens += [token for output in core.step() for token in output.token_ids]
        core.scheduler.check()
    assert tokens == plain_loop(request, 200)[0]
    assert core.runner.num_ahead == 4, "all but the first of the prompt and the first decode"
    assert core.runner.num_open == 0


@pytest.mark.parametrize("seed", range(6))
def test_random_workloads_have_the_texts_of_the_plain_loop(seed):
    """Arrivals, aborts, stop tokens, a small pool that preempts, shared prefixes."""
    chance = random.Random(seed)
    core = overlapping(num_blocks=chance.choice([14, 40]), max_model_len=40)
    requests = [
        make_request(
            f"r{i}",
            [chance.randrange(3) for _ in range(chance.randint(1, 14))],
            max_tokens=chance.randint(1, 14),
            seed=chance.randrange(4),
            stop_token_ids=(chance.randrange(40), chance.randrange(40)),
        )
        for i in range(20)
    ]
    aborted = {request.request_id for request in requests if chance.random() < 0.2}
    waiting, texts, reasons = list(requests), {}, {}
    while waiting or core.has_work:
        while waiting and chance.random() < 0.3:
            core.add(waiting.pop())
        for output in core.step():
            texts.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason:
                reasons[output.request_id] = output.finish_reason
        core.scheduler.check()
        if aborted and chance.random() < 0.2:
            core.abort(chance.choice(sorted(aborted)))
    for request in requests:
        want, reason, _ = plain_loop(request, 40)
        if request.request_id in aborted:
            assert texts.get(request.request_id, []) == want[: len(texts.get(request.request_id, []))]
        else:
            assert (texts[request.request_id], reasons[request.request_id]) == (want, reason)
    stats = core.scheduler.stats
    assert (stats.blocks_used, core.runner.num_open) == (0, 0)


def test_a_request_that_is_aborted_while_a_step_is_ahead_leaves_nothing():
    core = overlapping()
    core.add(make_request("r", [1, 2, 3], max_tokens=50))
    for _ in range(3):
        core.step()
    core.abort("r")
    assert core.has_work, "the step that was started is to be collected"
    assert core.step() == []
    assert not core.has_work
    assert core.scheduler.stats.blocks_used == 0


def test_a_step_that_fails_takes_the_one_ahead_with_it():
    core = overlapping()
    core.add(make_request("r", [1, 2, 3], max_tokens=50))
    for _ in range(3):
        core.step()
    core.runner.broken = True
    (output,) = core.step()
    assert output.finish_reason == "error"
    assert not core.has_work
    core.scheduler.check()
