"""API keys: how they look, what is stored of them, and who calls with one.

Knows randomness and digests. Knows no table and no HTTP. A key is `sk-`, a public id of 16 hexadecimal digits, `-` and
256 random bits; the store has the id and the SHA-256 of the whole, which such a secret needs no slow hash for.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Literal, get_args

from ernie_serve.billing.money import MAX_NANO
from ernie_serve.errors import Forbidden, SettingsError

Scope = Literal["inference", "read-usage", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_SCOPES: tuple[Scope, ...] = ("inference", "read-usage")

END_OF_TIME = 253_402_300_800
"""The year 10000, in seconds since 1970: what expires is told as a date, and dates end there."""

_KEY = re.compile(r"sk-([0-9a-f]{16})-[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """What one key may do; `None` is no limit. Months are those of the calendar, in UTC."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    month_nano: int | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            least = 0 if name == "month_nano" else 1
            if value is not None and not least <= value <= MAX_NANO:
                raise SettingsError(f"A key's {name} is {value}; give {least} to {MAX_NANO}, or nothing for no limit.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who calls: a key, its project and account, and what it may do. Callers without an account are not told apart."""

    account_id: str
    project_id: str
    key_id: str
    key_name: str = ""
    scopes: frozenset[Scope] = frozenset(DEFAULT_SCOPES)
    limits: KeyLimits = KeyLimits()
    project_month_nano: int | None = None
    expires: int | None = None

    def require(self, scope: Scope) -> None:
        """Raise `Forbidden` unless the key has `scope`; admin keys have them all."""
        if scope not in self.scopes and "admin" not in self.scopes:
            raise Forbidden(f"This key does not have the scope `{scope}`. Ask for a key that has it.")


def new_key() -> tuple[str, str]:
    """A fresh key and its public id. The key is shown once and stored nowhere."""
    public_id = secrets.token_hex(8)
    return f"sk-{public_id}-{secrets.token_urlsafe(32)}", public_id


def public_id_of(key: str) -> str | None:
    """The public part of a key, or `None` for what cannot be one."""
    match = _KEY.fullmatch(key)
    return None if match is None else match[1]


def digest(key: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def same(key: str, stored_digest: str) -> bool:
    """Whether a key is the one whose digest is stored, in a time that does not tell how nearly."""
    return hmac.compare_digest(digest(key), stored_digest)


def parse_scopes(names: str) -> tuple[Scope, ...]:
    """Scopes from names with commas between. Raises `SettingsError` for a name that is none."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in SCOPES]
    if unknown or not wanted:
        raise SettingsError(f"`{names[:80]}` does not name scopes; there are {', '.join(SCOPES)}.")
    return tuple(scope for scope in SCOPES if scope in wanted)
