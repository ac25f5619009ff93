"""One request's state: what it was asked, what it has said, how far its tokens are computed.

Knows ids and counts. Knows nothing about who else runs, which blocks are free, tensors or text.
"""

from dataclasses import dataclass, field
from hashlib import blake2b
from struct import pack

from ernie_serve.engine.constraint import Constraint
from ernie_serve.messages import UNKNOWN_TOKEN, EngineRequest, FinishReason, PlanRow, SamplingParams


@dataclass(eq=False, slots=True)
class Request:
    """A request inside the engine; a handful of facts, the rest follows from them.

    `num_computed` counts the tokens whose keys and values are in `block_ids`, or will be once the plans that are
    under way have run. `num_cached` is how much of the prompt the prefix cache held when the request first ran, which
    was at `began_at`.
    `num_scored` counts the prompt tokens whose logprobs have been told, without the first, which has none.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    salt: str
    order: tuple[int, int]
    """Its place among all requests: priority, then arrival. Lower runs first."""

    output_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_published: int = 0
    num_cached: int | None = None
    began_at: float | None = None
    num_scored: int = 0
    digests: list[bytes] = field(default_factory=list)
    constraint: Constraint | None = None

    @classmethod
    def arriving(cls, request: EngineRequest, arrival: int, constraint: Constraint | None = None) -> "Request":
        """A request that has just come in, as the `arrival`-th."""
        return cls(
            request_id=request.request_id,
            prompt_ids=request.prompt_token_ids,
            sampling=request.sampling,
            salt=request.cache_salt,
            order=(request.priority, arrival),
            constraint=constraint,
        )

    @property
    def priority(self) -> int:
        """Lower runs first."""
        return self.order[0]

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: the prompt and the output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Tokens known but not computed."""
        return len(self.prompt_ids) + len(self.output_ids) - self.num_computed

    @property
    def wants_scores(self) -> bool:
        """Whether logprobs of prompt tokens are still to be told; until then all of the prompt is computed."""
        return self.sampling.prompt_logprobs is not None and self.num_scored < len(self.prompt_ids) - 1

    def tokens(self, start: int, stop: int) -> list[int]:
        """The tokens at positions `start` to `stop` (exclusive), across prompt and output."""
        split = len(self.prompt_ids)
        if start >= split:
            return self.output_ids[start - split : stop - split]
        if stop <= split:
            return self.prompt_ids[start:stop]
        return self.prompt_ids[start:] + self.output_ids[: stop - split]

    def block_digests(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Digests of at least the first `num_blocks` blocks, all of which must be full; each is hashed once.

        A digest stands for every token up to the end of its block, and for the salt.
        """
        while len(self.digests) < num_blocks:
            start = len(self.digests) * block_size
            parent = self.digests[-1] if self.digests else _digest(self.salt.encode())
            tokens = self.tokens(start, start + block_size)
            self.digests.append(_digest(parent + pack(f"<{block_size}q", *tokens)))
        return self.digests

    def start(self, block_ids: list[int], num_found: int, block_size: int) -> None:
        """Run with these blocks, the first `num_found` of which are full of its tokens already."""
        self.block_ids = block_ids
        self.num_computed = num_found * block_size
        self.num_published = num_found
        if self.num_cached is None:
            self.num_cached = self.num_computed

    def take_row(self, count: int) -> PlanRow:
        """The next `count` pending tokens as a row of a plan; from now on they count as computed."""
        start = self.num_computed
        self.num_computed = stop = start + count
        return PlanRow(
            request_id=self.request_id,
            token_ids=self.tokens(start, stop),
            start=start,
            block_ids=self.block_ids,
            sampling=self.sampling,
            wants_token=stop == self.num_tokens and self.sampling.max_tokens > 0,
            prompt_token_ids=self.prompt_ids,
            output_token_ids=self.output_ids,
            wants_prompt_logprobs=self.wants_scores and start < len(self.prompt_ids) - 1,
        )

    def take_unknown(self) -> PlanRow:
        """The token after all that are known, which a step makes that is still under way; it counts as computed."""
        start = self.num_computed
        self.num_computed += 1
        return PlanRow(
            request_id=self.request_id,
            token_ids=[UNKNOWN_TOKEN],
            start=start,
            block_ids=self.block_ids,
            sampling=self.sampling,
            wants_token=True,
            prompt_token_ids=self.prompt_ids,
            output_token_ids=self.output_ids,
        )

    def is_last_under_way(self, max_len: int) -> bool:
        """Whether the token under way ends the text by its length, whatever it is."""
        return len(self.output_ids) + 1 >= self.sampling.max_tokens or self.num_tokens + 1 >= max_len

    def finish_reason(self, max_len: int) -> FinishReason | None:
        """Why the text ends with the newest token, if it does. `max_len` bounds prompt and output together."""
        sampling, num_output = self.sampling, len(self.output_ids)
        if self.constraint is not None and self.constraint.error:
            return "error"
        if self.constraint is not None and self.constraint.has_ended:
            return "stop"
        if num_output > sampling.min_tokens and self.output_ids[-1] in sampling.stop_token_ids:
            return "stop"
        if num_output >= sampling.max_tokens or self.num_tokens >= max_len:
            return "length"
        return None

    def restart(self) -> None:
        """Forget what is computed, keep what is said. The lists that a plan may hold are left as they are."""
        self.block_ids = []
        self.num_computed = 0
        self.num_published = 0


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=32).digest()
