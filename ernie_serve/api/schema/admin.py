"""The bodies of admin requests: keys, limits, credit.

Knows types and ranges. Money comes as a decimal in a string, or a whole number of dollars: a float is refused, because
it is not exact. So is a field that is not known: a limit with a typing error would be no limit.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from ernie_serve.api.schema.accepted import Integer, Text
from ernie_serve.billing.keys import DEFAULT_SCOPES, END_OF_TIME, Scope
from ernie_serve.billing.money import Nano, parse_usd
from ernie_serve.errors import SettingsError

INT63 = 2**63 - 1


def _nano(value: Any) -> Any:
    if isinstance(value, bool | float) or not isinstance(value, int | str):
        raise ValueError('it must be a decimal in a string, such as "0.07", or a whole number of dollars')
    try:
        return parse_usd(str(value), "it")
    except SettingsError as error:
        raise ValueError(str(error).removesuffix(".")) from None


def _printable(text: str) -> str:
    for character in text:
        if not character.isprintable():
            raise ValueError(f"it has the character U+{ord(character):04X}, which cannot be printed; leave that out")
    return text


def _no_blank(name: str) -> str:
    if not name.strip():
        raise ValueError("it is blank; give it a name that people can read")
    return name


Usd = Annotated[
    Nano, BeforeValidator(_nano), WithJsonSchema({"type": "string", "pattern": r"^-?[0-9]{1,9}(\.[0-9]{1,9})?$"})
]
Spendable = Annotated[Usd, Field(ge=0)]
Count = Annotated[Integer, Field(ge=1, le=INT63)]
Printable = Annotated[Text, Field(min_length=1, max_length=128), AfterValidator(_printable)]
Name = Annotated[Printable, AfterValidator(_no_blank)]


class AdminBody(BaseModel):
    """A body whose every field counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyLimitFields(AdminBody):
    """What bounds a key; null is no bound."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    max_concurrent: Count | None = None
    monthly_limit_usd: Spendable | None = None

    @property
    def changes(self) -> dict[str, int | None]:
        """The limits that were given, by their names in the store."""
        return {_STORED[name]: getattr(self, name) for name in self.model_fields_set if name in _STORED}


_STORED = {
    "requests_per_minute": "requests_per_minute",
    "tokens_per_minute": "tokens_per_minute",
    "max_concurrent": "concurrent",
    "monthly_limit_usd": "month_nano",
}


class NewKeyBody(KeyLimitFields):
    """`POST /admin/keys`: account and project are made where they are new."""

    name: Name
    account: Name = "default"
    project: Name = "default"
    credit_usd: Spendable = Nano(0)
    scopes: Annotated[list[Scope], Field(min_length=1)] = list(DEFAULT_SCOPES)
    expires_at: Annotated[Integer, Field(ge=0, lt=END_OF_TIME)] | None = None


class KeyChangeBody(KeyLimitFields):
    """`POST /admin/keys/{key_id}`: what is not given stays."""


class AccountChangeBody(AdminBody):
    """`POST /admin/accounts/{account_id}`: a closed account's keys are refused."""

    status: Literal["active", "disabled"]


class TopUpBody(AdminBody):
    """`POST /admin/accounts/{account_id}/topups`: an amount below zero takes away, which `kind` then has to say."""

    amount_usd: Usd
    kind: Literal["topup", "refund", "adjust"] = "topup"
    reference: Printable | None = None


class ProjectChangeBody(AdminBody):
    """`POST /admin/projects/{project_id}`: null is no limit."""

    monthly_limit_usd: Spendable | None
