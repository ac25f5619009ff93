"""What is counted can be read by Prometheus, and by nobody whose key is not for that."""

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from ernie_serve.billing.free import FreeMeter
from ernie_serve.messages import EngineStats


def counts(text: str) -> dict[str, float]:
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


def test_the_counts_are_those_of_now(call_with: Any, engine: Any) -> None:
    meter = FreeMeter()
    call = call_with(meter=meter)
    engine.stats = EngineStats(step=7, num_running=2, num_waiting=1, blocks_total=9, blocks_used=4, blocks_free=5)
    meter.counters.unsettled, meter.counters.store_failures = 3, 11
    seen = counts(call("GET", "/metrics").text)
    assert seen["ernie_serve_ready"] == 1
    assert seen["ernie_serve_engine_step_total"] == 7
    assert seen["ernie_serve_engine_num_running"] == 2
    assert seen["ernie_serve_engine_blocks_used"] == 4
    assert seen["ernie_serve_billing_unsettled"] == 3
    assert seen["ernie_serve_billing_store_failures_total"] == 11
    meter.counters.unsettled = 0
    assert counts(call("GET", "/metrics").text)["ernie_serve_billing_unsettled"] == 0


def test_every_count_of_the_meter_and_the_engine_is_told(call_with: Any, engine: Any) -> None:
    engine.stats = EngineStats()
    meter = FreeMeter()
    seen = " ".join(counts(call_with(meter=meter)("GET", "/metrics").text))
    for name in (*meter.counters.__dataclass_fields__, *EngineStats.__struct_fields__):
        assert f"_{name}" in seen


def test_requests_are_counted(call_with: Any, engine: Any) -> None:
    engine.stats = EngineStats()
    call = call_with()
    assert call("POST", "/v1/completions", json={"model": "ernie", "prompt": "Hi"}).status_code == 200
    assert counts(call("GET", "/metrics").text)["ernie_serve_billing_settled_total"] == 1


def test_a_loading_engine_is_not_ready(call_with: Any, engine: Any) -> None:
    engine.stats, engine.state = EngineStats(), "loading"
    assert counts(call_with()("GET", "/metrics").text)["ernie_serve_ready"] == 0


def test_a_key_is_needed_where_keys_are_asked_for(call_with: Any, engine: Any) -> None:
    engine.stats = EngineStats()
    call = call_with(meter=FreeMeter(["sk-one"]))
    assert call("GET", "/metrics").status_code == 401
    assert call("GET", "/metrics", headers={"authorization": "Bearer sk-one"}).status_code == 200
