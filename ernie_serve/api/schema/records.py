"""What billing's endpoints answer, for the API's own description.

Knows shapes alone. Money as a JSON number is an exact decimal; read it as one, or take the whole number beside it.
"""

from typing import Any, Literal

from ernie_serve.api.schema.answers import Answered


class Amount(Answered):
    """So many US dollars."""

    value: float
    currency: Literal["usd"]


class UsageResult(Answered):
    """Tokens and requests of one group in one bucket."""

    object: Literal["organization.usage.completions.result"]
    input_tokens: int
    input_cached_tokens: int
    output_tokens: int
    num_model_requests: int
    cost_nano_usd: int
    project_id: str | None
    api_key_id: str | None
    model: str | None


class CostsResult(Answered):
    """Money of one group in one bucket."""

    object: Literal["organization.costs.result"]
    amount: Amount
    cost_nano_usd: int
    line_item: str | None
    project_id: str | None
    api_key_id: str | None


class Bucket(Answered):
    """A span of time and what was used in it."""

    object: Literal["bucket"]
    start_time: int
    end_time: int
    results: list[UsageResult | CostsResult]


class BucketPage(Answered):
    """OpenAI's page of buckets."""

    object: Literal["page"]
    data: list[Bucket]
    has_more: bool
    next_page: str | None


class RateLimit(Answered):
    """Requests an interval; -1 is no limit."""

    requests: int
    interval: Literal["1m"]


class AccountStanding(Answered):
    """What the key's account has, and what of that is held for running requests."""

    id: str
    balance: float
    balance_nano_usd: int
    reserved: float
    reserved_nano_usd: int


class KeyStandingData(Answered):
    """OpenRouter's key, in US dollars."""

    label: str
    name: str
    usage: float
    usage_nano_usd: int
    usage_daily: float
    usage_weekly: float
    usage_monthly: float
    limit: float | None
    limit_reset: Literal["monthly"] | None
    limit_remaining: float | None
    limit_of: Literal["key", "project"] | None
    expires_at: str | None
    rate_limit: RateLimit
    scopes: list[str]
    project_id: str
    account: AccountStanding


class KeyStanding(Answered):
    """The answer of /v1/key."""

    data: KeyStandingData


class GenerationData(Answered):
    """OpenRouter's generation."""

    id: str
    model: str
    created_at: str
    total_cost: float
    cost_nano_usd: int
    status: Literal["ok", "cancelled", "failed"]
    finish_reason: str | None
    latency: int | None
    generation_time: int | None
    native_tokens_prompt: int
    native_tokens_completion: int
    native_tokens_reasoning: int
    native_tokens_cached: int


class GenerationAnswer(Answered):
    """The answer of /v1/generation."""

    data: GenerationData


class KeyRecord(Answered):
    """A key, without the key."""

    id: str
    object: Literal["key"]
    name: str
    redacted_value: str
    status: Literal["active", "disabled", "expired", "account_closed"]
    account_id: str
    account: str
    project_id: str
    project: str
    scopes: list[str]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrent: int | None
    monthly_limit_usd: str | None
    monthly_limit_nano_usd: int | None
    created_at: int
    last_used_at: int | None
    expires_at: int | None
    disabled_at: int | None


class NewKeyRecord(KeyRecord):
    """A key that was just made, with itself in `value`."""

    value: str


class AccountRecord(Answered):
    """An account."""

    id: str
    object: Literal["account"]
    name: str
    status: Literal["active", "disabled"]
    balance_usd: str
    balance_nano_usd: int
    reserved_usd: str
    reserved_nano_usd: int
    created_at: int


class ProjectRecord(Answered):
    """A project."""

    id: str
    object: Literal["project"]
    name: str
    account_id: str
    monthly_limit_usd: str | None
    monthly_limit_nano_usd: int | None
    created_at: int


class RecordList(Answered):
    """A page of keys, accounts, bookings, projects or price lists; the next is `after` the last id."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    has_more: bool
    last_id: str | None
