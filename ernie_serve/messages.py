"""What crosses between rooms: frozen, plain data that msgpack can carry.

Knows no tensor, no text, no HTTP and no money. A message is built once, by the room on one side of a
border, and only read on the other.
"""

from typing import Literal

from msgspec import Struct

FinishReason = Literal["stop", "length", "abort", "error"]
"""Why a request ended: a stop token, a length limit, the caller's abort, a failure of ours."""


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next tokens of one request are chosen. Every value is already validated.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 are off. `stop_token_ids` holds every id that ends the
    text, end-of-sequence ids included (they are left out for `ignore_eos`). `logprobs` is the number of
    alternatives wanted beside the chosen token, `None` for no logprobs at all. The seed is always there:
    whoever wants chance draws one.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None


class EngineRequest(Struct, frozen=True, kw_only=True):
    """One text to continue. A lower `priority` runs first; `cache_salt` keeps prefix caches apart."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    cache_salt: str = ""


class PlanRow(Struct, frozen=True, kw_only=True):
    """What one request computes in a step.

    `token_ids` stand at positions `start`, `start + 1`, …; everything before `start` is in the KV cache
    already, and `block_ids` is the block table that covers all of it, and may go on beyond. Where
    `wants_token` is true the last of them yields a new token. The prompt and the output so far belong to the
    engine: read, never keep.
    """

    request_id: str
    token_ids: list[int]
    start: int
    block_ids: list[int]
    sampling: SamplingParams
    wants_token: bool
    prompt_token_ids: list[int]
    output_token_ids: list[int]


class StepPlan(Struct, frozen=True):
    """One step of the engine: the rows that run together."""

    step: int
    rows: list[PlanRow]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step, over all rows."""
        return sum(len(row.token_ids) for row in self.rows)


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """The log-probability of a chosen token and of the likeliest alternatives, likeliest first.

    Natural logarithms of the model's own distribution, before temperature, penalties and bias.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Sampled(Struct, frozen=True):
    """A token that a row of the plan yielded."""

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None


class EngineOutput(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one request got from one step.

    `token_ids` are new, the stop token included. `num_cached_tokens` is how much of the prompt the prefix
    cache held. The last output of a request, and only the last, has a `finish_reason`; `stop_token_id` is the
    id that caused it, if one did; `error` is what to tell the caller when the reason is "error".
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    error: str = ""


class EngineStats(Struct, frozen=True, kw_only=True):
    """The engine's counts after a step. `used + cached + free == total` holds for blocks, always.

    `step` and `num_preempted` count since the engine began; the others are of this moment.
    """

    step: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_preempted: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_free: int = 0


class EngineInfo(Struct, frozen=True, kw_only=True):
    """What an engine that is ready says of itself. Sizes in bytes, lengths in tokens."""

    device: str
    dtype: str
    weight_bytes: int
    kv_bytes: int
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    load_seconds: float


# To the engine.


class Generate(Struct, frozen=True, tag=True):
    """Start a request."""

    request: EngineRequest


class Abort(Struct, frozen=True, tag=True):
    """Stop a request; what it held comes back. Unknown and finished ids are ignored."""

    request_id: str


class Shutdown(Struct, frozen=True, tag=True):
    """End the engine process; running requests are dropped."""


EngineCommand = Generate | Abort | Shutdown


# From the engine.


class Loading(Struct, frozen=True, tag=True):
    """How far loading is: a share between 0 and 1, and what is being done."""

    share: float
    what: str


class Ready(Struct, frozen=True, tag=True):
    """The engine has produced a token and takes requests."""

    info: EngineInfo


class Stepped(Struct, frozen=True, tag=True):
    """The outputs of one step, for all its requests, in one message."""

    outputs: list[EngineOutput]
    stats: EngineStats


class Failed(Struct, frozen=True, tag=True):
    """The engine ends; every request with it. `message` is for whoever runs the server."""

    message: str


EngineReport = Loading | Ready | Stepped | Failed
