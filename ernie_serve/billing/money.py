"""Money as a whole number of nano-USD, and its exact decimal spelling.

Knows digits. Knows no account and no price. A float never appears: a double is exact only up to nine million dollars.
"""

import re
from typing import NewType

from ernie_serve.errors import SettingsError

Nano = NewType("Nano", int)
"""Billionths of a US dollar."""

NANO_PER_USD = 1_000_000_000
MAX_NANO = 2**63 - 1
"""What a 64-bit column holds: 9.2 billion dollars."""

_DECIMAL = re.compile(r"(-?)([0-9]{1,100})(?:\.([0-9]{1,30}))?")


def format_usd(nano: int) -> str:
    """Dollars as the shortest exact decimal: 21000 is `0.000021`, 5 dollars are `5`. At most nine places."""
    sign = "-" if nano < 0 else ""
    dollars, rest = divmod(abs(nano), NANO_PER_USD)
    places = f"{rest:09d}".rstrip("0")
    return f"{sign}{dollars}.{places}" if places else f"{sign}{dollars}"


def parse_usd(text: str, what: str = "amount") -> Nano:
    """Nano-USD from a decimal number of dollars. Raises `SettingsError` unless it is a whole number of nano-USD."""
    return Nano(scaled(text, 9, what))


def scaled(text: str, places: int, what: str) -> int:
    """A decimal number times ten to the `places`. Raises `SettingsError` where that is not whole or not stored."""
    match = _DECIMAL.fullmatch(text.strip())
    if match is None:
        raise SettingsError(f"{what} is `{text[:40]}`, which is not a decimal number of US dollars such as 5 or 0.07.")
    sign, whole, fraction = match[1], match[2], (match[3] or "").rstrip("0")
    if len(fraction) > places:
        raise SettingsError(
            f"{what} is `{text[:40]}`, finer than a billionth of a dollar; give {places} places or fewer."
        )
    value = int(whole + fraction.ljust(places, "0"))
    if value > MAX_NANO:
        raise SettingsError(f"{what} is `{text[:40]}`, more than the ledger can hold ({format_usd(MAX_NANO)}).")
    return -value if sign else value
