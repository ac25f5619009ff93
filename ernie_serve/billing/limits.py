"""How fast one key may ask: requests and tokens a minute, and how many at once.

Knows keys and the time. Knows no money and no store: each server process counts for itself. Levels are integers in
units of a sixty-billionth of a request or token, so that a minute's share of every nanosecond is whole and exact.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ernie_serve.billing.keys import Caller
from ernie_serve.errors import RateLimited

_UNITS = 60_000_000_000
_MAX_KEYS = 100_000


@dataclass(frozen=True, slots=True)
class RateStatus:
    """Where a key stands with one of its limits."""

    limit: int
    remaining: int
    reset_ns: int


class Limiter:
    """The limits of every key this process has seen lately."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._keys: dict[str, _Key] = {}

    def take(self, caller: Caller, num_tokens: int) -> None:
        """Admit one request of `num_tokens`, or raise `RateLimited` and take nothing."""
        limits, key = caller.limits, self._key(caller)
        if limits.concurrent is not None and key.running >= limits.concurrent:
            raise RateLimited(
                f"This key has {key.running} requests running and may have {limits.concurrent} at once. "
                "Wait for one to end.",
                retry_after_seconds=1,
            )
        for bucket, amount, what in ((key.requests, 1, "requests"), (key.tokens, num_tokens, "tokens")):
            if bucket is None:
                continue
            if amount > bucket.rate:
                raise RateLimited(
                    f"This request counts {amount} tokens, and the key may use {bucket.rate} tokens a minute. "
                    "Send a shorter prompt or a smaller max_tokens."
                )
            wait = bucket.wait_ns(amount)
            if wait:
                raise RateLimited(
                    f"This key may use {bucket.rate} {what} a minute; {bucket.remaining} are left and {amount} are "
                    f"needed. Try again in {format_duration(wait)}.",
                    retry_after_seconds=-(-wait // 1_000_000_000),
                )
        for bucket, amount in ((key.requests, 1), (key.tokens, num_tokens)):
            if bucket is not None:
                bucket.take(amount)
        key.running += 1

    def end(self, caller: Caller, unused_tokens: int, *, refused: bool = False) -> None:
        """A request has ended: give back what it took and did not use. Negative takes what it used beyond."""
        key = self._key(caller)
        key.running = max(0, key.running - 1)
        if key.tokens is not None:
            key.tokens.take(-unused_tokens)
        if refused and key.requests is not None:
            key.requests.take(-1)

    def status(self, caller: Caller) -> dict[str, RateStatus]:
        """Where the key stands, by `requests` and `tokens`, as far as these are limited."""
        key = self._key(caller)
        named = (("requests", key.requests), ("tokens", key.tokens))
        return {name: bucket.status() for name, bucket in named if bucket is not None}

    def headers(self, caller: Caller) -> dict[str, str]:
        """The values of `x-ratelimit-…` by name."""
        return {
            f"x-ratelimit-{field}-{name}": value
            for name, status in self.status(caller).items()
            for field, value in (
                ("limit", str(status.limit)),
                ("remaining", str(status.remaining)),
                ("reset", format_duration(status.reset_ns)),
            )
        }

    def _key(self, caller: Caller) -> "_Key":
        now = self._now_ns()
        key = self._keys.get(caller.key_id)
        if key is None:
            if len(self._keys) >= _MAX_KEYS:
                self._keys = {each: kept for each, kept in self._keys.items() if kept.running}
            key = self._keys[caller.key_id] = _Key()
        key.requests = _adjusted(key.requests, caller.limits.requests_per_minute, now)
        key.tokens = _adjusted(key.tokens, caller.limits.tokens_per_minute, now)
        return key


class _Bucket:
    """Fills evenly to one minute's worth. May owe: a request that used more than it asked for is paid off by time."""

    __slots__ = ("level", "rate", "seen_ns")

    def __init__(self, rate: int, now_ns: int) -> None:
        self.rate = rate
        self.level = rate * _UNITS
        self.seen_ns = now_ns

    def fill(self, rate: int, now_ns: int) -> None:
        self.level = min(self.level + max(0, now_ns - self.seen_ns) * self.rate, rate * _UNITS)
        self.rate, self.seen_ns = rate, now_ns

    def take(self, amount: int) -> None:
        self.level = min(self.level - amount * _UNITS, self.rate * _UNITS)

    def wait_ns(self, amount: int) -> int:
        return -(-max(0, amount * _UNITS - self.level) // self.rate)

    @property
    def remaining(self) -> int:
        return max(0, self.level // _UNITS)

    def status(self) -> RateStatus:
        return RateStatus(self.rate, self.remaining, self.wait_ns(self.rate))


@dataclass(slots=True)
class _Key:
    requests: _Bucket | None = None
    tokens: _Bucket | None = None
    running: int = 0


def _adjusted(bucket: _Bucket | None, rate: int | None, now_ns: int) -> _Bucket | None:
    if rate is None:
        return None
    if bucket is None:
        return _Bucket(rate, now_ns)
    bucket.fill(rate, now_ns)
    return bucket


def format_duration(ns: int) -> str:
    """A duration as clients of this kind of header read it, rounded up: `12ms`, `1.5s`, `6m0s`."""
    ms = -(-ns // 1_000_000)
    if ms < 1000:
        return f"{ms}ms"
    seconds, ms = divmod(ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    fraction = f".{ms:03d}".rstrip("0") if ms else ""
    return f"{minutes}m{seconds}{fraction}s" if minutes else f"{seconds}{fraction}s"
