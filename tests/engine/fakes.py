"""A runner with a memory instead of a model, and the plain loop it is compared with.

What a token leaves in its slot depends on the slot before it, and the next token depends on everything that can be
read through the block table, so a wrong table, a stale block or a missing token changes the text.
As a script, `fakes.py FD` is an engine process that talks through an inherited pipe.
"""

import sys
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection

from ernie_serve.engine import wire
from ernie_serve.engine.core import EngineCore
from ernie_serve.engine.kv_cache import BlockPool
from ernie_serve.engine.scheduler import Scheduler
from ernie_serve.messages import (
    EngineInfo,
    EngineRequest,
    Loading,
    Ready,
    Sampled,
    SamplingParams,
    StepPlan,
    TokenLogprobs,
    TokenMasks,
)

VOCAB_SIZE = 40


class FakeRunner:
    """Reads and writes `num_blocks * block_size` slots as a model would, and refuses what a model could not do."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[int | None] = [None] * (num_blocks * block_size)
        self.num_computed = 0  # tokens, over all steps
        self.failures: list[Exception] = []  # raised by the next steps, the last first
        self.during: Callable[[StepPlan], None] | None = None  # what happens while a step is computed

    def launch(self, plan: StepPlan) -> None:
        """Every step has to be executed."""

    def execute(self, plan: StepPlan, masks=None, is_wanted=None) -> list[Sampled]:
        if self.failures:
            raise self.failures.pop()
        if self.during:
            self.during(plan)
        if is_wanted and not is_wanted():
            return []
        assert plan.rows, "a plan without rows"
        assert len({row.request_id for row in plan.rows}) == len(plan.rows), "a request twice in a plan"
        self._refuse_shared_writes(plan)
        # As in a real step, nothing that a row writes may be needed by another row of the step.
        states = [self._read(row.block_ids, row.start) for row in plan.rows]
        allowed = allowed_ids(masks()) if masks else {}
        return [
            Sampled(row.request_id, -1 if token is None else token, prompt_logprobs=score(row))
            for row, state in zip(plan.rows, states, strict=True)
            if (token := self._compute(row, state, allowed.get(row.request_id))) is not None
            or row.wants_prompt_logprobs
        ]

    def _compute(self, row, read: list[int], allowed: list[int] | None) -> int | None:
        stop = row.start + len(row.token_ids)
        assert row.token_ids, "a row without tokens"
        assert len(row.block_ids) * self.block_size >= stop, "the block table is too short"
        known = row.prompt_token_ids + row.output_token_ids
        assert row.token_ids == known[row.start : stop], "the tokens are not those at their positions"
        is_end = stop == len(known) and row.sampling.max_tokens > 0
        assert row.wants_token == is_end, "a token is wanted in the middle, or not at the end"
        self.num_computed += len(row.token_ids)
        for position, token in enumerate(row.token_ids, row.start):
            read.append(leave(read, token))
            self.slots[self._slot(row.block_ids, position)] = read[-1]
        if not row.wants_token:
            return None
        token = next_token(read, row.sampling.seed)
        return token if allowed is None else allowed[zlib.crc32(b"%d" % token, read[-1]) % len(allowed)]

    def _read(self, block_ids: list[int], stop: int) -> list[int]:
        read = [self.slots[self._slot(block_ids, position)] for position in range(stop)]
        assert None not in read, "an unwritten slot is read"
        return read

    def _slot(self, block_ids: list[int], position: int) -> int:
        return block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def _refuse_shared_writes(self, plan: StepPlan) -> None:
        size = self.block_size
        writers: dict[int, str] = {}
        for row in plan.rows:
            stop = row.start + len(row.token_ids)
            for block_id in row.block_ids[row.start // size : -(-stop // size)]:
                assert block_id not in writers, "two rows write one block"
                writers[block_id] = row.request_id
        for row in plan.rows:
            for block_id in row.block_ids[: -(-row.start // size)]:
                assert writers.get(block_id, row.request_id) == row.request_id, "a row writes what another reads"


def allowed_ids(masks: TokenMasks) -> dict[str, list[int]]:
    """The ids that each row may yield."""
    size, found = masks.bytes_per_row, {}
    for n, request_id in enumerate(masks.request_ids):
        bits = int.from_bytes(masks.bits[n * size : (n + 1) * size], "little")
        found[request_id] = [i for i in range(8 * size) if bits >> i & 1]
        assert found[request_id], "a mask lets nothing through"
        assert found[request_id][-1] < VOCAB_SIZE, "a mask lets padding through"
    return found


def score(row) -> list[TokenLogprobs]:
    """For each token of a row that has a successor in the prompt: that one, with its position as its logprob."""
    if not row.wants_prompt_logprobs:
        return []
    last = min(row.start + len(row.token_ids), len(row.prompt_token_ids) - 1)
    return [TokenLogprobs(row.prompt_token_ids[at], float(at), []) for at in range(row.start + 1, last + 1)]


def leave(read: list[int], token: int) -> int:
    """What a token leaves in its slot, given what stands in all the slots before."""
    return zlib.crc32(b"%d %d" % (token, len(read)), read[-1] if read else 0)


def next_token(read: list[int], seed: int) -> int:
    return zlib.crc32(repr(read).encode(), seed) % VOCAB_SIZE


def plain_loop(request: EngineRequest, max_len: int) -> tuple[list[int], str, int | None]:
    """Output, finish reason and stop token of a request that has the machine to itself."""
    sampling, output, read = request.sampling, [], []
    for token in request.prompt_token_ids:
        read.append(leave(read, token))
    while len(output) < sampling.max_tokens:
        output.append(next_token(read, sampling.seed))
        read.append(leave(read, output[-1]))
        if output[-1] in sampling.stop_token_ids and len(output) > sampling.min_tokens:
            return output, "stop", output[-1]
        if len(request.prompt_token_ids) + len(output) >= max_len:
            break
    return output, "length", None


def make_request(request_id: str, prompt: list[int], max_tokens: int = 8, **options) -> EngineRequest:
    outer = {name: options.pop(name) for name in ("priority", "cache_salt") if name in options}
    sampling = SamplingParams(max_tokens=max_tokens, seed=options.pop("seed", 7), **options)
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, **outer)


def make_core(
    num_blocks: int = 64, block_size: int = 4, *, enable_prefix_caching: bool = True, grammars=None, **limits
) -> EngineCore:
    pool = BlockPool(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 200} | limits
    return EngineCore(Scheduler(pool, **limits), FakeRunner(num_blocks, block_size), grammars)


def make_info(core: EngineCore) -> EngineInfo:
    return EngineInfo(
        device="fake",
        dtype="int",
        weight_bytes=0,
        kv_bytes=0,
        num_blocks=core.scheduler.pool.num_blocks,
        block_size=core.scheduler.pool.block_size,
        max_model_len=core.scheduler.max_model_len,
        max_num_seqs=core.scheduler.max_num_seqs,
        max_num_batched_tokens=core.scheduler.max_num_batched_tokens,
        load_seconds=0.0,
    )


if __name__ == "__main__":
    pipe = Connection(int(sys.argv[1]))
    engine = make_core(num_blocks=1000, max_model_len=4000)
    wire.send(pipe, Loading(0.5, "half"))
    wire.send(pipe, Ready(make_info(engine)))
    engine.serve(pipe)
