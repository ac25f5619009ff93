"""What is counted can be read by Prometheus, and by nobody whose key is not for that."""

import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ernie_serve.billing.free import FreeMeter
from ernie_serve.messages import EngineStats


def counts(text: str) -> dict[str, float]:
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


def test_the_counts_are_those_of_now(call_with: Any, engine: Any) -> None:
    meter = FreeMeter()
    call = call_with(meter=meter)
    engine.stats = EngineStats(
        step=7, num_running=2, num_waiting=1, num_preempted=6, num_blocks=8, blocks_used=2, blocks_free=6
    )
    meter.counters.unsettled, meter.counters.store_failures = 3, 11
    seen = counts(call("GET", "/metrics").text)
    assert seen["ernie_serve_ready"] == 1
    assert seen["ernie_serve_engine_step_total"] == 7
    assert seen["ernie_serve_num_requests_running"] == 2
    assert seen["ernie_serve_num_requests_waiting"] == 1
    assert seen["ernie_serve_num_preemptions_total"] == 6
    assert seen["ernie_serve_kv_cache_usage_perc"] == 0.25
    assert seen["ernie_serve_engine_blocks_used"] == 2
    assert seen["ernie_serve_billing_unsettled"] == 3
    assert seen["ernie_serve_billing_store_failures_total"] == 11
    meter.counters.unsettled = 0
    assert counts(call("GET", "/metrics").text)["ernie_serve_billing_unsettled"] == 0


def test_every_count_of_the_meter_and_the_engine_is_told(call_with: Any, engine: Any) -> None:
    engine.stats = EngineStats()
    meter = FreeMeter()
    seen = " ".join(counts(call_with(meter=meter)("GET", "/metrics").text))
    as_in_vllm = {
        "num_running": "num_requests_running",
        "num_waiting": "num_requests_waiting",
        "num_preempted": "num_preemptions",
    }
    for name in (*meter.counters.__dataclass_fields__, *EngineStats.__struct_fields__):
        assert f"_{as_in_vllm.get(name, name)}" in seen


def test_only_what_is_counted_from_the_start_is_named_a_total(call: Any, engine: Any) -> None:
    engine.stats = EngineStats()
    told = list(text_string_to_metric_families(call("GET", "/metrics").text))
    assert {family.type for family in told} == {"counter", "gauge", "histogram"}
    for family in told:
        names = {sample.name for sample in family.samples}
        assert not [name for name in names if name.endswith("_total") != (family.type == "counter")]


def test_requests_are_counted(call_with: Any, engine: Any) -> None:
    engine.stats = EngineStats()
    call = call_with()
    assert call("POST", "/v1/completions", json={"model": "ernie", "prompt": "Hi"}).status_code == 200
    assert counts(call("GET", "/metrics").text)["ernie_serve_billing_settled_total"] == 1


def test_tokens_times_and_ends_of_requests_are_counted(call_with: Any, engine: Any) -> None:
    engine.stats, engine.num_cached, engine.step = EngineStats(), 1, 4
    call = call_with()
    asked = {"model": "ernie", "prompt": "Hi", "max_tokens": 8}
    for fields in ({}, {"stream": True}, {"n": 2}, {"prompt": "Hello", "max_tokens": 99}):
        assert call("POST", "/v1/completions", json=asked | fields).status_code == 200
    engine.break_after = 3
    assert call("POST", "/v1/completions", json=asked).status_code == 500
    assert call("POST", "/v1/completions", json=asked | {"model": "no"}).status_code == 404
    assert call("GET", "/v1/models").status_code == 200
    assert call("GET", "/wp-admin.php").status_code == 404
    text = call("GET", "/metrics").text
    seen = counts(text)
    assert seen["ernie_serve_prompt_tokens_total"] == 4 * 2 + 5
    assert seen["ernie_serve_prompt_tokens_cached_total"] == 5
    assert seen["ernie_serve_generation_tokens_total"] == 4 * 8 + 14 + 4
    assert seen["ernie_serve_prefix_cache_queries_total"] == 4 * 2 + 5
    assert seen["ernie_serve_prefix_cache_hits_total"] == 5
    for name in (
        "time_to_first_token",
        "request_time_per_output_token",
        "e2e_request_latency",
        "request_queue_time",
        "request_prefill_time",
        "request_decode_time",
    ):
        assert seen[f"ernie_serve_{name}_seconds_count"] == 5
        assert seen[f"ernie_serve_{name}_seconds_sum"] > 0
    parts = [seen[f"ernie_serve_request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(seen["ernie_serve_e2e_request_latency_seconds_sum"])
    for name in ("prompt", "generation"):
        assert seen[f"ernie_serve_request_{name}_tokens_count"] == 5
        assert seen[f"ernie_serve_request_{name}_tokens_sum"] == seen[f"ernie_serve_{name}_tokens_total"]
    for reason, count in (("length", 3), ("stop", 1), ("failed", 1)):
        assert f'ernie_serve_request_success_total{{finished_reason="{reason}"}} {count}.0' in text
    for path, status, count in (
        ("/v1/completions", 200, 4),
        ("/v1/completions", 500, 1),
        ("/v1/completions", 404, 1),
        ("/v1/models", 200, 1),
        ("other", 404, 1),
    ):
        assert f'ernie_serve_http_requests_total{{path="{path}",status="{status}"}} {count}.0' in text


@pytest.mark.parametrize(("stream", "status"), [(False, 400), (True, 200)])
def test_what_its_own_constraints_ended_is_no_failure(call: Any, engine: Any, stream: bool, status: int) -> None:
    engine.stats, engine.break_after, engine.error_code = EngineStats(), 3, "no_token_left"
    body = {"model": "ernie", "prompt": "Hi", "stream": stream}
    assert call("POST", "/v1/completions", json=body).status_code == status
    text = call("GET", "/metrics").text
    assert 'ernie_serve_request_success_total{finished_reason="refused"} 1.0' in text
    assert '"failed"' not in text


def test_a_request_that_never_began_counts_in_no_time_and_no_length(call: Any, engine: Any) -> None:
    engine.stats, engine.break_after = EngineStats(), 0
    assert call("POST", "/v1/completions", json={"model": "ernie", "prompt": "Hi"}).status_code == 500
    seen = counts(call("GET", "/metrics").text)
    assert seen["ernie_serve_e2e_request_latency_seconds_count"] == 1
    for name in ("queue_time_seconds", "prefill_time_seconds", "decode_time_seconds"):
        assert seen[f"ernie_serve_request_{name}_count"] == 0
    for name in ("prompt_tokens", "generation_tokens"):
        assert seen[f"ernie_serve_request_{name}_count"] == 0


def test_one_line_of_the_log_says_what_a_request_took(call: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "ernie_serve.api.billed"):
        said = call("POST", "/v1/completions", json={"model": "ernie", "prompt": "Hi", "max_tokens": 3}).json()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "ernie_serve.api.billed"]
    assert re.fullmatch(said["id"] + r" length: 2 tokens in, 3 out, first after \d+\.\d{3} s, \d+\.\d{3} s", line)


def test_a_loading_engine_is_not_ready(call_with: Any, engine: Any) -> None:
    engine.stats, engine.state = EngineStats(), "loading"
    assert counts(call_with()("GET", "/metrics").text)["ernie_serve_ready"] == 0


def test_a_key_is_needed_where_keys_are_asked_for(call_with: Any, engine: Any) -> None:
    engine.stats = EngineStats()
    call = call_with(meter=FreeMeter(["sk-one"]))
    assert call("GET", "/metrics").status_code == 401
    assert call("GET", "/metrics", headers={"authorization": "Bearer sk-one"}).status_code == 200
