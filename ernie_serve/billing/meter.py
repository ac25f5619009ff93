"""What a server asks of billing: who calls, may it run, what did it cost, what was used.

Knows the shapes of the question and of the answer. `paid.py` answers with a store behind it, `free.py` without.
"""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from sqlalchemy import Connection

from ernie_serve.billing.keys import Caller
from ernie_serve.billing.money import Nano, format_usd
from ernie_serve.billing.prices import Prices, Status, Usage
from ernie_serve.errors import ErnieServeError

P = ParamSpec("P")
T = TypeVar("T")

LEASE_TOKENS = 1024
"""Output tokens of one choice that are held at a time when a request names no `max_tokens`."""

LEAST_TOKENS = 256
"""What one choice of such a request is admitted with at least, unless it can have fewer anyway."""

_AHEAD = 256


class AlreadyAnswered(ErnieServeError):
    """The idempotency key belongs to a request that has been answered: send that answer again."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"Request {request_id} answered this.")
        self.request_id = request_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a request is about to cost at most.

    `prompt_tokens` are those of all its prompts, `n` is the number of its choices. `max_tokens` is what the client
    asked for in each choice in the field `length_param`, `None` if it did not; `most_tokens` what a choice may have at
    all. An `idempotency_key` comes with the SHA-256 of the body.
    """

    request_id: str
    model: str
    prompt_tokens: int
    most_tokens: int
    max_tokens: int | None = None
    length_param: str = "max_tokens"
    n: int = 1
    idempotency_key: str | None = None
    body_sha256: str = ""

    def __post_init__(self) -> None:
        if self.prompt_tokens < 0 or self.n < 1 or self.most_tokens < 0 or (self.max_tokens or 0) < 0:
            raise ValueError(f"Impossible order: {self}")

    @property
    def tokens_each(self) -> int:
        """The most tokens that one choice can have."""
        return self.most_tokens if self.max_tokens is None else min(self.max_tokens, self.most_tokens)

    @property
    def want_tokens(self) -> int:
        """Output tokens to hold at first, all choices together."""
        return self.n * (min(LEASE_TOKENS, self.tokens_each) if self.max_tokens is None else self.tokens_each)

    @property
    def least_tokens(self) -> int:
        """Output tokens without which the request is refused."""
        return self.n * (min(LEAST_TOKENS, self.tokens_each) if self.max_tokens is None else self.tokens_each)


@dataclass(frozen=True, slots=True)
class Charge:
    """What a request cost. `kept` is false while the store is away: it will be written later."""

    cost_nano: Nano
    usage: Usage
    price_version: int
    kept: bool = True

    @property
    def cost_usd(self) -> str:
        """An exact decimal of at most nine places, to be written as it is."""
        return format_usd(self.cost_nano)


class Charging:
    """A charge on its way to the store, which goes on whatever becomes of those who await it."""

    def __init__(self) -> None:
        self._ended = asyncio.Event()
        self._charge: Charge | None = None
        self._error: Exception | None = None

    def end(self, charge: Charge | None, error: Exception | None = None) -> None:
        """Tell all who wait what it became."""
        self._charge, self._error = charge, error
        self._ended.set()

    def __await__(self) -> Generator[Any, None, Charge]:
        """What it became, once that is written for good. Raises the error that it ended with."""
        return self._wait().__await__()

    async def _wait(self) -> Charge:
        await self._ended.wait()
        if self._charge is None:
            assert self._error is not None, "ended without a charge or an error"
            raise self._error
        return self._charge


class Reservation:
    """Money held for one running request.

    `covered` output tokens, all choices together, are paid for; no more may be sent. `exhausted` tells that more were
    wanted and could not be held.
    """

    def __init__(
        self,
        caller: Caller,
        order: Order,
        prices: Prices,
        covered: int,
        extend: "Callable[[Reservation, int], Awaitable[int]] | None" = None,
    ) -> None:
        self.caller = caller
        self.order = order
        self.prices = prices
        self.covered = covered
        self.most = order.n * order.tokens_each
        """Output tokens that the request can have at all."""
        self.exhausted = False
        self.charge: Charging | None = None
        self._extend = extend
        self._extending: asyncio.Task[None] | None = None

    async def cover(self, num_tokens: int) -> bool:
        """Whether `num_tokens` of output are paid for, extending the lease ahead of need.

        Costs a comparison while they are. After `False` send only `covered` tokens, stop generating, and settle.
        """
        if num_tokens <= self.covered - (_AHEAD if self.covered < self.most else 0):
            return True
        self._look_ahead(num_tokens)
        while num_tokens > self.covered and self._extending is not None:
            await asyncio.shield(self._extending)
            self._look_ahead(num_tokens)
        return num_tokens <= self.covered

    def _look_ahead(self, num_tokens: int) -> None:
        if self._extending is not None and self._extending.done():
            self._extending = None
        idle = self._extending is None and not self.exhausted and self.charge is None
        if idle and self._extend is not None and self.covered < min(num_tokens + _AHEAD, self.most):
            self._extending = asyncio.ensure_future(self._extend_once(self._extend))

    async def _extend_once(self, extend: "Callable[[Reservation, int], Awaitable[int]]") -> None:
        tokens = await extend(self, min(self.order.n * LEASE_TOKENS, self.most - self.covered))
        self.covered += tokens
        self.exhausted = tokens == 0


@dataclass(slots=True)
class Counters:
    """What has happened since the start, for metrics."""

    reserved: int = 0
    refused_payment: int = 0
    refused_rate: int = 0
    settled: int = 0
    charged_nano: int = 0
    waived_nano: int = 0
    store_failures: int = 0
    unsecured_leases: int = 0
    orphans_released: int = 0
    unsettled: int = 0
    """Settlements that wait in memory for the store to come back. More than none is an alarm."""


class Meter(Protocol):
    """Billing as the server sees it."""

    charges: bool
    """Whether requests cost anything."""

    counters: Counters

    async def authenticate(self, key: str | None) -> Caller:
        """Who calls. Raises `Unauthorized`, with one text for every reason."""
        ...

    async def reserve(self, caller: Caller, order: Order) -> Reservation:
        """Hold what a request can cost, before anything is generated.

        Raises `PaymentRequired`, `RateLimited`, `StoreUnavailable`, `Forbidden`; with an idempotency key also
        `AlreadyAnswered`, `RequestConflict` and `IdempotencyMismatch`. Nothing is held then.
        """
        ...

    def settle(
        self,
        reservation: Reservation,
        usage: Usage,
        status: Status,
        *,
        finish_reason: str | None = None,
        ttft_us: int | None = None,
        total_us: int | None = None,
    ) -> Charging:
        """Charge what was computed and let the hold go; the usage is written for good when what this returns is.

        Every reservation is settled once, whatever became of it; a second time gives the first charge. To be called in
        an event loop.
        """
        ...

    async def report(self, read: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a function of `reports`, or a reading one of `accounts`, tells."""
        ...

    async def change(self, do: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do what a writing function of `accounts` or `office` does, for good."""
        ...

    def rate_headers(self, caller: Caller) -> dict[str, str]:
        """`x-ratelimit-…` for an answer to this caller."""
        ...

    async def close(self) -> None:
        """Write what still waits, and let go of the store."""
        ...
