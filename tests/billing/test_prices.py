"""One function says what a request costs."""

import pytest

from ernie_serve.billing.prices import Prices, Usage, prices_from_usd
from ernie_serve.config import Settings
from ernie_serve.errors import SettingsError


def test_the_prices_are_seventy_and_two_hundred_and_eighty_nano_dollars():
    usual = Settings()
    prices = prices_from_usd(usual.input_price, usual.output_price, usual.cached_input_price)
    assert (prices.input_nano, prices.cached_nano, prices.output_nano) == (70, 70, 280)
    assert prices == Prices()
    million = Usage(prompt_tokens=10**6, completion_tokens=10**6)
    assert prices.cost(million) == 70_000_000 + 280_000_000


def test_cached_input_has_its_own_price():
    prices = prices_from_usd("0.07", "0.28", "0.007")
    usage = Usage(prompt_tokens=100, cached_tokens=64, completion_tokens=3, reasoning_tokens=2)
    assert prices.cost(usage) == 36 * 70 + 64 * 7 + 3 * 280
    assert prices.cost(usage, "cancelled") == prices.cost(usage)
    assert prices.cost(usage, "failed") == 0
    assert prices.prompt_hold(100) == 7000
    assert prices_from_usd("0.07", "0.28", "0.1").prompt_hold(100) == 10_000


@pytest.mark.parametrize("price", ["0.0701", "0.00001", "-0.07", "2000000", "cheap", "nan"])
def test_a_price_that_is_not_whole_nano_dollars_a_token_is_refused(price):
    with pytest.raises(SettingsError, match=r"input price.*million"):
        prices_from_usd(price, "0.28", None)


@pytest.mark.parametrize(
    "given",
    [{"prompt_tokens": -1}, {"prompt_tokens": 1, "cached_tokens": 2}, {"completion_tokens": 1, "reasoning_tokens": 2}],
)
def test_usage_that_cannot_be_is_a_bug(given):
    with pytest.raises(ValueError, match="Impossible usage"):
        Usage(**given)
