"""What requests took and how they ended, for /metrics: tokens, times, and answers by their status.

Knows numbers of requests that have ended. Knows no text, no key and no engine. After `ernie_serve_` the names are those
that vLLM has after `vllm:`, where they mean the same.
"""

from dataclasses import dataclass

from prometheus_client import Counter, Histogram, disable_created_metrics
from prometheus_client.registry import Collector

from ernie_serve.api.auth import listed
from ernie_serve.billing.prices import Usage

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series beside each count that says when it began

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request that has ended. `reason` is why its last choice did, or "cancelled", "refused", "failed".

    All times are from its coming on: until the engine began with it, until its first token, and until its end.
    """

    reason: str
    choices: int
    usage: Usage
    queue_seconds: float | None = None
    first_seconds: float | None
    seconds: float

    def __str__(self) -> str:
        """A line for the log."""
        usage = self.usage
        first = "" if self.first_seconds is None else f", first after {self.first_seconds:.3f} s"
        cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
        made = f"{usage.prompt_tokens} tokens{cached} in, {usage.completion_tokens} out"
        return f"{self.reason}: {made}{first}, {self.seconds:.3f} s"


class Measures:
    """The sums of a server since its start."""

    def __init__(self) -> None:
        self._prompt = _counter("prompt_tokens", "Tokens of prompts that were begun.")
        self._cached = _counter("prompt_tokens_cached", "Of these, tokens that were in the cache.")
        self._output = _counter("generation_tokens", "Tokens that were made.")
        self._looked_for = _counter("prefix_cache_queries", "Tokens of prompts that the prefix cache was asked for.")
        self._found = _counter("prefix_cache_hits", "Of these, tokens that it had.")
        self._ended = _counter(
            "request_success",
            "Requests for text, by why they ended: stop, …, cancelled, refused, failed.",
            "finished_reason",
        )
        self._answers = _counter("http_requests", "Answers, by path and status.", "path", "status")
        self._first = _histogram(
            "time_to_first_token_seconds", "From a request, once read, to its first token.", _FIRST
        )
        self._each = _histogram(
            "request_time_per_output_token_seconds", "Mean time of a choice's tokens after the first.", _EACH
        )
        self._whole = _histogram("e2e_request_latency_seconds", "From a request, once read, to its end.", _WHOLE)
        self._queue = _histogram(
            "request_queue_time_seconds", "From a request, once read, to the engine's beginning with it.", _FIRST
        )
        self._prefill = _histogram("request_prefill_time_seconds", "From there to its first token.", _FIRST)
        self._decode = _histogram("request_decode_time_seconds", "From its first token to its end.", _WHOLE)
        self._prompts = _histogram("request_prompt_tokens", "Tokens of a request's prompts, once begun.", _TOKENS)
        self._outputs = _histogram("request_generation_tokens", "Tokens made for such a request.", _TOKENS)

    @property
    def collectors(self) -> list[Collector]:
        """What Prometheus asks."""
        tokens: list[Collector] = [self._prompt, self._cached, self._output, self._looked_for, self._found]
        times = [self._first, self._each, self._whole, self._queue, self._prefill, self._decode]
        return [*tokens, self._ended, self._answers, *times, self._prompts, self._outputs]

    def note(self, record: Record) -> None:
        """A request for text has ended."""
        usage = record.usage
        for each in (self._prompt, self._looked_for):
            each.inc(usage.prompt_tokens)
        for each in (self._cached, self._found):
            each.inc(usage.cached_tokens)
        self._output.inc(usage.completion_tokens)
        if usage.prompt_tokens:
            self._prompts.observe(usage.prompt_tokens)
            self._outputs.observe(usage.completion_tokens)
        self._ended.labels(record.reason).inc()
        self._whole.observe(record.seconds)
        if record.queue_seconds is not None:
            self._queue.observe(record.queue_seconds)
        if record.first_seconds is not None:
            if record.queue_seconds is not None:
                self._prefill.observe(record.first_seconds - record.queue_seconds)
            self._decode.observe(record.seconds - record.first_seconds)
            self._first.observe(record.first_seconds)
            if (behind := usage.completion_tokens / record.choices - 1) > 0:
                self._each.observe((record.seconds - record.first_seconds) / behind)

    def answered(self, path: str, status: int) -> None:
        """A request was answered. Its path is told as far as some route is known to lie below it."""
        self._answers.labels(listed(path) or "other", str(status)).inc()


def _counter(name: str, told: str, *labels: str) -> Counter:
    return Counter(f"ernie_serve_{name}", told, labels, registry=None)


def _histogram(name: str, told: str, bounds: tuple[float, ...]) -> Histogram:
    return Histogram(f"ernie_serve_{name}", told, buckets=bounds, registry=None)
