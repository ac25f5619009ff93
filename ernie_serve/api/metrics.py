"""GET /metrics: what the engine and the meter count, in the Prometheus text format.

Knows names, units and help of counts. What means the same as in vLLM has vLLM's name, with `ernie_serve_` for `vllm:`.
Knows nothing of who reads them: a key with the scope metrics may, where keys are asked for. No prompt, answer or key is
in any of them.

Source: Prometheus exposition format 0.0.4, by prometheus_client.
"""

from collections.abc import Iterator

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.services import Services
from ernie_serve.messages import EngineStats

ENGINE_GAUGES = {
    "num_blocks": "Blocks of the KV cache.",
    "blocks_used": "Blocks that running requests hold.",
    "blocks_cached": "Blocks without an owner that a prefix may be found in.",
    "blocks_free": "Blocks with nothing in them.",
}
ENGINE_COUNTERS = {"step": "Steps."}
METER_GAUGES = {
    "unsettled": "Finished requests whose charge waits in memory for the billing store: more than none is an alarm."
}
METER_COUNTERS = {
    "reserved": "Requests that were let in.",
    "refused_payment": "Requests refused with 402.",
    "refused_rate": "Requests refused with 429.",
    "settled": "Requests that were charged, or let off.",
    "charged_nano": "Charged, in nano-USD.",
    "waived_nano": "Not charged because the fault was ours, in nano-USD.",
    "store_failures": "Attempts at the billing store that failed: a rise is an alarm.",
    "unsecured_leases": "Leases that were extended while the store was away.",
    "orphans_released": "Holds of servers that died, given back.",
}


class Counts:
    """Reads the counts anew whenever they are asked for."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        """Every count, as Prometheus knows it."""
        services, stats = self._services, self._services.engine.stats
        yield GaugeMetricFamily("ernie_serve_ready", "1 while requests are answered.", services.engine.state == "ready")
        yield from engine_families(stats)
        yield from families("engine", stats, ENGINE_GAUGES, ENGINE_COUNTERS)
        yield from families("billing", services.meter.counters, METER_GAUGES, METER_COUNTERS)


def engine_families(stats: EngineStats) -> Iterator[Metric]:
    """What vLLM counts of its engine as well, by vLLM's names."""
    usage = stats.blocks_used / (stats.num_blocks or 1)
    for name, told, value in (
        ("num_requests_running", "Requests that the engine computes.", stats.num_running),
        ("num_requests_waiting", "Requests that wait for room.", stats.num_waiting),
        ("kv_cache_usage_perc", "Share of the KV cache that running requests hold, from 0 to 1.", usage),
    ):
        yield GaugeMetricFamily(f"ernie_serve_{name}", told, value)
    told = "Requests that gave their blocks back and came again."
    yield CounterMetricFamily("ernie_serve_num_preemptions", told, stats.num_preempted)


def families(room: str, counts: object, gauges: dict[str, str], counters: dict[str, str]) -> Iterator[Metric]:
    """The named attributes of `counts`."""
    for name, told in gauges.items():
        yield GaugeMetricFamily(f"ernie_serve_{room}_{name}", told, getattr(counts, name))
    for name, told in counters.items():
        yield CounterMetricFamily(f"ernie_serve_{room}_{name}", told, getattr(counts, name))


def router(services: Services) -> APIRouter:
    """The endpoint's route."""
    routes = APIRouter()
    registry = CollectorRegistry()
    registry.register(Counts(services))
    for each in services.measures.collectors:
        registry.register(each)

    @routes.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes
