from typing import Any

import pytest

from ernie_serve.api.schema.accepted import MAX_METADATA
from ernie_serve.api.schema.chat import ChatRequest
from ernie_serve.api.schema.validation import validated
from ernie_serve.errors import InvalidRequest

BASE = {"model": "m", "messages": []}

RIGHT: list[dict[str, Any]] = [
    {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "store": True},
    {"metadata": {"k" * 64: "v" * 512}},
    {"metadata": {str(number): "" for number in range(MAX_METADATA)}},
    {"prediction": {"type": "content", "content": "text"}},
    {"prediction": {"type": "content", "content": [{"type": "text", "text": "text"}]}},
    {"prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit"}},
    {"service_tier": "flex"},
    {"modalities": ["text"], "verbosity": "medium"},
]

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"user": 1}, "user", "must be a string"),
    ({"store": "yes"}, "store", "must be true or false"),
    ({"metadata": []}, "metadata", "must be an object"),
    ({"metadata": {"a": 1}}, "metadata.a", "must be a string"),
    ({"metadata": {"k" * 65: ""}}, f"metadata.{'k' * 65}", "at most 64"),
    ({"metadata": {"a": "v" * 513}}, "metadata.a", "at most 512"),
    ({"metadata": {str(number): "" for number in range(17)}}, "metadata", "17 entries; it may have 16"),
    ({"prediction": {"type": "content"}}, "prediction.content", "is required"),
    ({"prediction": {"type": "content", "content": [1]}}, "prediction.content", "text parts"),
    ({"prediction": {"type": "other", "content": ""}}, "prediction.type", "must be 'content'"),
    ({"service_tier": "best"}, "service_tier", "'auto', 'default'"),
    ({"prompt_cache_retention": "1h"}, "prompt_cache_retention", "must be"),
]


@pytest.mark.parametrize("fields", RIGHT)
def test_what_openai_knows_is_accepted(fields: dict[str, Any]) -> None:
    validated(ChatRequest, {**BASE, **fields}).require_supported()


@pytest.mark.parametrize(("fields", "param", "told"), WRONG)
def test_what_is_out_of_range_is_named(fields: dict[str, Any], param: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as raised:
        validated(ChatRequest, {**BASE, **fields})
    assert raised.value.param == param


@pytest.mark.parametrize(("tier", "told"), [(None, {}), ("flex", {"service_tier": "default"})])
def test_there_is_one_service_tier(tier: str | None, told: dict[str, str]) -> None:
    assert validated(ChatRequest, {**BASE, "service_tier": tier}).told_tier == told
