"""What crosses between rooms: frozen, plain data that msgpack can carry.

Knows no tensor, no text, no HTTP and no money. A message is built once, by the room on one side of a
border, and only read on the other.
"""

from typing import Literal

from msgspec import Struct

FinishReason = Literal["stop", "length", "error"]
"""Why a request ended: a stop token, a length limit, a failure of ours."""

ErrorCode = Literal["", "no_token_left"]
"""An error that is not ours: the request's own constraints forbid every token."""


GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark", "tools"]


class Grammar(Struct, frozen=True):
    """What an answer must look like. Made by hand or by `grammar.tools.tool_grammar`, compiled by the engine.

    `text` is a JSON schema, a regular expression that the whole answer matches, a JSON array of strings of which the
    answer is one, a Lark grammar, or what `tool_grammar` writes; a JSON object of any content needs none.
    """

    kind: GrammarKind
    text: str = ""


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next tokens of one request are chosen. Every value is already validated.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 are off. `stop_token_ids` holds every id that ends the
    text, end-of-sequence ids included (they are left out for `ignore_eos`). `logprobs` is the number of
    alternatives wanted beside the chosen token, `None` for no logprobs at all; `prompt_logprobs` the same for the
    tokens of the prompt. The seed is always there: whoever wants chance draws one.

    With a `grammar` the answer matches it, and ends where it may end: by a stop token, or at once where nothing can
    follow. With `grammar_after_token_id` it binds what comes after the first token of that id; text before it is free
    but cannot end. `allowed_token_ids`, unless empty, are all that may ever be chosen, stop tokens included.
    `bad_words` are token sequences that the answer does not contain. After `max_reasoning_tokens` tokens without
    `reasoning_end_token_id` the answer goes on with `reasoning_end_forced_ids` (that id alone, if empty).
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
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    grammar_after_token_id: int | None = None
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    max_reasoning_tokens: int | None = None
    reasoning_end_token_id: int | None = None
    reasoning_end_forced_ids: tuple[int, ...] = ()

    @property
    def is_constrained(self) -> bool:
        """Whether some token may be out of bounds for more than its likelihood."""
        return (
            self.grammar is not None
            or bool(self.allowed_token_ids or self.bad_words)
            or self.max_reasoning_tokens is not None
        )


class EngineRequest(Struct, frozen=True, kw_only=True):
    """One text to continue. A lower `priority` runs first; `cache_salt` keeps prefix caches apart."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    cache_salt: str = ""


UNKNOWN_TOKEN = -1
"""Stands in a plan for the token that the step before it makes, while that step is still under way."""


class PlanRow(Struct, frozen=True, kw_only=True):
    """What one request computes in a step.

    `token_ids` stand at positions `start`, `start + 1`, …; everything before `start` is in the KV cache
    already, and `block_ids` is the block table that covers all of it, and may go on beyond. Where
    `wants_token` is true the last of them yields a new token. Where `wants_prompt_logprobs` is true each of them that
    has a successor in the prompt yields that one's logprobs. The prompt and the output so far belong to the engine:
    read, never keep.
    """

    request_id: str
    token_ids: list[int]
    start: int
    block_ids: list[int]
    sampling: SamplingParams
    wants_token: bool
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    wants_prompt_logprobs: bool = False


class StepPlan(Struct, frozen=True):
    """One step of the engine: the rows that run together."""

    step: int
    rows: list[PlanRow]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step, over all rows."""
        return sum(len(row.token_ids) for row in self.rows)


class TokenMasks(Struct, frozen=True):
    """Which tokens some rows of a plan may yield; rows that are not named are free.

    Token `i` of the `n`-th named row may be chosen if bit `i % 8` of byte `n * bytes_per_row + i // 8` is set. A row
    has at least one such token, and none beyond the tokenizer's.
    """

    request_ids: list[str]
    bits: bytearray
    bytes_per_row: int


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """The log-probability of a chosen token and of the likeliest alternatives, likeliest first.

    Natural logarithms of the model's own distribution, before temperature, penalties and bias.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


NO_TOKEN = -1
"""Stands where a row yielded none."""


class Sampled(Struct, frozen=True):
    """What a row of the plan yielded: a token, the logprobs of prompt tokens, or both.

    `token_id` is `NO_TOKEN` for a row that wanted none, or whose logits were found to be no numbers. `prompt_logprobs`
    are of the tokens from position `start + 1` of the row.
    """

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] = []


class EngineOutput(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one request got from one step.

    `token_ids` are new, the stop token included; the first output may have none, and tells that a part of the prompt is
    computed. `num_cached_tokens` is how much of the prompt the prefix cache held. `began_at` is when the engine began
    with the request, by `time.monotonic`, which all processes of a machine share; it comes with the first token, and
    before that with an output that has no token. The last output of a request, and only the last, has a
    `finish_reason`; `stop_token_id` is the id that caused it, if one did; `error` is what to tell the caller when the
    reason is "error", `error_code` what kind of error it is, where the caller could do something about it.
    `prompt_logprobs`, over all outputs of a request, are of its prompt's tokens in order, without the first.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    began_at: float | None = None
    error: str = ""
    error_code: ErrorCode = ""


class EngineStats(Struct, frozen=True, kw_only=True):
    """The engine's counts after a step. `used + cached + free` blocks are `num_blocks`, always.

    `step` and `num_preempted` count since the engine began; the others are of this moment.
    """

    step: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_preempted: int = 0
    num_blocks: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_free: int = 0


class EngineInfo(Struct, frozen=True, kw_only=True):
    """What an engine that is ready says of itself. Sizes in bytes, lengths in tokens."""

    device: str
    dtype: str
    kv_dtype: str = ""
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


class Working(Struct, frozen=True, tag=True):
    """A step that takes long is under way, and a part of it more is computed."""


class Failed(Struct, frozen=True, tag=True):
    """The engine ends; every request with it. `message` is for whoever runs the server."""

    message: str


EngineReport = Loading | Ready | Stepped | Working | Failed
