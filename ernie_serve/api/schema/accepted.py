"""The fields that OpenAI knows and that never change the text of an answer: checked, accepted, without effect.

Knows their types and limits. Nothing here is kept, except that an answer repeats its service tier.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AllowInfNan, BaseModel, BeforeValidator, Field, Strict, WithJsonSchema

Boolean = Annotated[bool, Strict()]
Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict(), AllowInfNan(False)]
Text = Annotated[str, Strict()]
Texts = Annotated[list[Text], Field(fail_fast=True)]

MAX_METADATA = 16


def _few(metadata: Any) -> Any:
    if isinstance(metadata, dict) and len(metadata) > MAX_METADATA:
        raise ValueError(f"it has {len(metadata)} entries; it may have {MAX_METADATA}")
    return metadata


Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], BeforeValidator(_few)
]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast"]


_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
    "required": ["type", "text"],
}


def _predicted(content: Any) -> Any:
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise ValueError("it must be a string or a list of text parts")
    return content


class Prediction(BaseModel):
    """Text that the answer may repeat. It speeds nothing up here, and none of it is billed."""

    type: Literal["content"]
    content: Annotated[
        Any,
        AfterValidator(_predicted),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]}),
    ]


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
