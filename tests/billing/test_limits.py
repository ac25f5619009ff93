"""Rates: exact to the nanosecond, against a plain count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_serve.billing.keys import Caller, KeyLimits
from ernie_serve.billing.limits import Limiter, format_duration
from ernie_serve.errors import RateLimited

SECOND = 10**9


def caller(**limits: int) -> Caller:
    return Caller(account_id="a", project_id="p", key_id="k", limits=KeyLimits(**limits))


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0ms"),
        (1, "1ms"),
        (12_000_000, "12ms"),
        (999_000_001, "1s"),
        (1_500_000_000, "1.5s"),
        (59_999_000_000, "59.999s"),
        (360 * SECOND, "6m0s"),
        (61_020_000_000, "1m1.02s"),
    ],
)
def test_durations_read_like_those_of_other_servers(ns, text):
    assert format_duration(ns) == text


@given(
    rate=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.integers(0, 70 * SECOND), st.integers(0, 1200)), max_size=30),
)
def test_the_bucket_is_exact_to_the_nanosecond(rate, steps):
    now = 0
    limiter = Limiter(lambda: now)
    somebody = caller(tokens_per_minute=rate)
    limiter.status(somebody)
    level = rate * 60 * SECOND  # in sixty-billionths, refilled by `rate` each nanosecond
    for wait, amount in steps:
        now += wait
        level = min(rate * 60 * SECOND, level + wait * rate)
        allowed = amount <= rate and level >= amount * 60 * SECOND
        if allowed:
            limiter.take(somebody, amount)
            level -= amount * 60 * SECOND
        else:
            with pytest.raises(RateLimited) as refused:
                limiter.take(somebody, amount)
            wait_seconds = refused.value.retry_after_seconds
            missing = amount * 60 * SECOND - level
            assert wait_seconds is None or 0 <= wait_seconds * rate * SECOND - missing < rate * SECOND
            assert (wait_seconds is None) == (amount > rate)
        status = limiter.status(somebody)["tokens"]
        assert (status.limit, status.remaining) == (rate, level // (60 * SECOND))
        assert status.reset_ns == -(-(rate * 60 * SECOND - level) // rate)


def test_what_was_used_beyond_the_estimate_is_paid_off_by_time():
    now = 0
    limiter = Limiter(lambda: now)
    somebody = caller(tokens_per_minute=60)
    limiter.take(somebody, 50)
    limiter.end(somebody, -40)  # 90 in all
    assert limiter.headers(somebody)["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimited) as refused:
        limiter.take(somebody, 1)
    assert refused.value.retry_after_seconds == 31
    now += 31 * SECOND
    limiter.take(somebody, 1)


def test_a_request_larger_than_a_minute_is_told_so():
    with pytest.raises(RateLimited, match="counts 61 tokens, and the key may use 60") as refused:
        Limiter(lambda: 0).take(caller(tokens_per_minute=60), 61)
    assert refused.value.retry_after_seconds is None


def test_a_changed_rate_holds_at_once():
    limiter = Limiter(lambda: 0)
    limiter.take(caller(requests_per_minute=10), 0)
    assert limiter.headers(caller(requests_per_minute=3))["x-ratelimit-remaining-requests"] == "3"
    assert limiter.headers(caller(requests_per_minute=20))["x-ratelimit-remaining-requests"] == "3"
    assert limiter.headers(caller()) == {}


def test_a_thousand_cancels_leave_nobody_running():
    limiter = Limiter(lambda: 0)
    somebody = caller(concurrent=1)
    for _ in range(1000):
        limiter.take(somebody, 5)
        limiter.end(somebody, 5, refused=True)
    limiter.take(somebody, 5)
    with pytest.raises(RateLimited):
        limiter.take(somebody, 5)


def test_many_keys_do_not_grow_without_bound(monkeypatch):
    monkeypatch.setattr("ernie_serve.billing.limits._MAX_KEYS", 10)
    limiter = Limiter(lambda: 0)
    for index in range(100):
        limiter.status(Caller(account_id="a", project_id="p", key_id=f"k{index}"))
    assert len(limiter._keys) <= 10
