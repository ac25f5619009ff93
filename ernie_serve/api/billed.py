"""One job from its hold to its charge: money is held before it begins, and it is charged once, whatever ends it.

Knows the meter, and what of a job costs something. Knows no field and no shape of an answer. Who pays: a job that we
fail costs nothing; one whose client leaves costs its prompts as far as they were begun and the tokens made so far.
"""

import hashlib
import logging
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import orjson
from starlette.requests import Request

from ernie_serve.api.generation import Generation
from ernie_serve.api.measures import Record
from ernie_serve.api.replays import not_kept
from ernie_serve.api.services import Services
from ernie_serve.api.telling import Job
from ernie_serve.billing.keys import Caller
from ernie_serve.billing.meter import AlreadyAnswered, Charging, Order, Reservation
from ernie_serve.billing.prices import Status
from ernie_serve.errors import InvalidRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Claim:
    """A client's `Idempotency-Key` and the SHA-256 of what it asked with it."""

    key: str
    sha256: str


class Billed:
    """A job at work for somebody who pays.

    `async with` holds the money, and raises what `Meter.reserve` raises; of these `AlreadyAnswered` only for a whole
    answer. Leaving it charges, as a failure of ours unless `charge` was called before, or `client_left`, or the request
    itself is at fault and text was told.
    """

    def __init__(self, services: Services, caller: Caller, job: Job, claim: Claim | None = None) -> None:
        self._services = services
        self._caller = caller
        self._job = job
        self._claim = claim
        self._status: Status = "failed"
        self._charging: Charging | None = None
        self.has_told = False  # to be set once something of an answer was sent

    generation: Generation
    _reservation: Reservation
    _came_at: float

    async def __aenter__(self) -> "Billed":
        services = self._services
        self._came_at = time.monotonic()
        order = order_of(self._job, services.model_name, self._claim)
        try:
            self._reservation = await services.meter.reserve(self._caller, order)
        except AlreadyAnswered:
            if self._job.stream:
                raise not_kept() from None
            raise
        self.generation = Generation(services.engine, services.tokenizer, self._job, self._reservation)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._charging is None:
            at_fault = isinstance(error, InvalidRequest)  # its own constraints ended it
            if self.has_told and at_fault:
                self._status = "cancelled"
            self._charging = self._settle(self._status, "refused" if at_fault else self._status)
        await self._charging  # also of a client that left between its charge and its end

    @property
    def claimed(self) -> bool:
        """Whether the answer is kept for whoever asks the same again."""
        return self._claim is not None

    def client_left(self) -> None:
        """Say that the client is gone: what ends the job now is no failure of ours."""
        self._status = "cancelled"

    def charge(self) -> None:
        """Charge the whole job, whatever becomes of whoever asked for it. After a whole answer `keep` is due."""
        if self._claim is not None and not self._job.stream:
            self._services.replays.expect(self._job.id)
        self._charging = self._settle("ok", self.generation.finish_reason or "stop")

    async def usage(self) -> dict[str, Any]:
        """OpenAI's usage object, with what it cost if that is counted, once that is charged for good."""
        assert self._charging is not None, "nothing was charged"
        charge = await self._charging
        usage = self.generation.usage
        if self._services.meter.charges:
            usage |= {"cost": exact(charge.cost_usd), "cost_nano_usd": charge.cost_nano}
        return usage

    def keep(self, body: bytes | None) -> None:
        """Keep an answer for whoever asks the same with the same `Idempotency-Key`; there may be none."""
        if self._claim is not None:
            self._services.replays.put(self._job.id, body)

    def _settle(self, status: Status, reason: str) -> Charging:
        generation, came = self.generation, self._came_at
        began, first = generation.began_at, generation.first_token_at
        record = Record(
            reason=reason,
            choices=len(self._job.choices),
            usage=generation.used,
            queue_seconds=None if began is None else max(0.0, began - came),
            first_seconds=None if first is None else first - came,
            seconds=time.monotonic() - came,
        )
        self._services.measures.note(record)
        logger.info("%s %s", self._job.id, record)
        return self._services.meter.settle(
            self._reservation,
            record.usage,
            status,
            finish_reason=generation.finish_reason,
            ttft_us=None if record.first_seconds is None else int(record.first_seconds * 1e6),
            total_us=int(record.seconds * 1e6),
        )


def order_of(job: Job, model: str, claim: Claim | None = None) -> Order:
    """The most that a job can cost. Where nothing is asked of the engine that is nothing."""
    asked = [choice for choice in job.choices if choice.request.sampling.max_tokens > 0]
    prompts = {choice.prompt_index: len(choice.request.prompt_token_ids) for choice in asked}
    longest = max((0 if choice.prompt_only else choice.request.sampling.max_tokens for choice in asked), default=0)
    return Order(
        request_id=job.id,
        model=model,
        prompt_tokens=sum(prompts.values()),
        most_tokens=longest,
        max_tokens=longest if job.length_given else None,
        length_param=job.length_param,
        n=len(job.choices),
        idempotency_key=claim.key if claim else None,
        body_sha256=claim.sha256 if claim else "",
    )


def claim_of(request: Request, body: bytes) -> Claim | None:
    """The `Idempotency-Key` of a request, with a digest of where it was sent and what it says."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    return Claim(key, hashlib.sha256(request.url.path.rstrip("/").encode() + b"\n" + body).hexdigest())


def exact(decimal: str) -> orjson.Fragment:
    """A decimal as a JSON number, digit for digit: a float on the way might round it."""
    return orjson.Fragment(decimal)
