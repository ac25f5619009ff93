"""The fields that OpenAI knows and that never change the text of an answer: checked, accepted, without effect.

Knows their types and limits. Nothing here is kept, except that an answer repeats its service tier.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AllowInfNan, BaseModel, Field, Strict

Boolean = Annotated[bool, Strict()]
Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict(), AllowInfNan(False)]
Text = Annotated[str, Strict()]

MAX_METADATA = 16


def _few(metadata: dict[str, str]) -> dict[str, str]:
    if len(metadata) > MAX_METADATA:
        raise ValueError(f"it has {len(metadata)} entries; it may have {MAX_METADATA}")
    return metadata


Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], AfterValidator(_few)
]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast"]


class PredictedPart(BaseModel):
    """A part of a predicted text."""

    type: Literal["text"]
    text: Text


class Prediction(BaseModel):
    """Text that the answer may repeat. It speeds nothing up here, and none of it is billed."""

    type: Literal["content"]
    content: Text | list[PredictedPart]


class Accepted(BaseModel):
    """What a request may say beside its text. There is one service tier; prompts are cached by what they hold."""

    user: Text | None = None
    metadata: Metadata | None = None
    service_tier: ServiceTier | None = None
    safety_identifier: Text | None = None
    store: Boolean | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None

    @property
    def told_tier(self) -> dict[str, Any]:
        """The tier that an answer reports, if its request named one."""
        return {} if self.service_tier is None else {"service_tier": "default"}
