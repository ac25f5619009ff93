"""What a token costs, and the one function that says what a request costs.

Knows tokens and nano-USD. Knows no account, no store and no HTTP.
"""

from dataclasses import dataclass
from typing import Literal

from ernie_serve.billing.money import Nano, format_usd, scaled
from ernie_serve.errors import SettingsError

Status = Literal["ok", "cancelled", "failed"]
"""How a request ended: answered, left by its client, or failed by us."""

_MAX_NANO_PER_TOKEN = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The tokens of one request, all choices together. Cached are part of the prompt, reasoning of the completion."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.cached_tokens <= self.prompt_tokens and 0 <= self.reasoning_tokens <= self.completion_tokens):
            raise ValueError(f"Impossible usage: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Nano-USD for a token of one model. `version` names the price list in the store; 0 is not stored yet."""

    input_nano: int = 70
    cached_nano: int = 70
    output_nano: int = 280
    version: int = 0

    def cost(self, usage: Usage, status: Status = "ok") -> Nano:
        """What a request costs: nothing when we failed it, else every token that was computed for it, once."""
        if status == "failed":
            return Nano(0)
        fresh = usage.prompt_tokens - usage.cached_tokens
        return Nano(
            fresh * self.input_nano
            + usage.cached_tokens * self.cached_nano
            + usage.completion_tokens * self.output_nano
        )

    def prompt_hold(self, num_tokens: int) -> Nano:
        """The most that a prompt can cost, whatever of it turns out to be cached."""
        return Nano(num_tokens * max(self.input_nano, self.cached_nano))


def prices_from_usd(input_per_million: str, output_per_million: str, cached_per_million: str | None) -> Prices:
    """Prices from dollars for a million tokens. Raises `SettingsError` where a token would not cost whole nano-USD."""
    cached = input_per_million if cached_per_million is None else cached_per_million
    return Prices(
        input_nano=_per_token(input_per_million, "The input price"),
        cached_nano=_per_token(cached, "The price of cached input"),
        output_nano=_per_token(output_per_million, "The output price"),
    )


def usd_per_million(nano: int) -> str:
    """Dollars for a million tokens, from nano-USD for one."""
    return format_usd(nano * 1_000_000)


def _per_token(text: str, what: str) -> int:
    """A dollar for a million tokens is a thousand nano-USD for one: three places and no more."""
    nano = scaled(text, 3, f"{what} for a million tokens")
    if not 0 <= nano <= _MAX_NANO_PER_TOKEN:
        raise SettingsError(f"{what} for a million tokens is {text}; it lies between 0 and 1000000.")
    return nano
