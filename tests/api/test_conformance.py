"""Bodies and chunks against OpenAI's own description of them, where a copy of it lies beside the repository.

Three things the description does not allow are what OpenAI sends all the same, and what its SDK reads: in a stream of
completions `finish_reason` is null until the end, `usage` is null until the last chunk where it was asked for, and the
first token of a prompt that is scored has the log-probability null.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from ernie_serve.billing.free import FreeMeter
from ernie_serve.billing.meter import Charge, Charging, Reservation
from ernie_serve.billing.money import Nano
from ernie_serve.billing.prices import Status, Usage

SPEC = Path(__file__).resolve().parents[3] / "shared" / "reference" / "openai_spec_subset.json"

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    if not SPEC.is_file():
        pytest.skip(f"no copy of OpenAI's description at {SPEC}")
    found: dict[str, Any] = json.loads(SPEC.read_text())["components"]["schemas"]
    return found


def faults(value: Any, schema: dict[str, Any], schemas: dict[str, Any], path: str = "body") -> list[str]:
    """What of a value the schema does not allow. Knows the words that OpenAI's description uses."""
    if "$ref" in schema:
        target = {**schemas[schema["$ref"].rpartition("/")[2]]}
        return faults(value, {**target, "nullable": schema.get("nullable", False)}, schemas, path)
    if value is None and schema.get("nullable"):
        return []
    found: list[str] = []
    for word in ("anyOf", "oneOf"):
        if word in schema and all(faults(value, each, schemas, path) for each in schema[word]):
            found.append(f"{path} is none of the {word}")
    for each in schema.get("allOf", []):
        found += faults(value, each, schemas, path)
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path} is {value!r}, not one of {schema['enum']}")
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return [*found, f"{path} is {value!r}, not of type {kind}"]
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            found += faults(item, schema["items"], schemas, f"{path}[{index}]")
    if isinstance(value, dict):
        found += [f"{path} has no {name}" for name in schema.get("required", []) if name not in value]
        others = schema.get("additionalProperties")
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, others if isinstance(others, dict) else {})
            found += faults(item, inner, schemas, f"{path}.{name}")
    return found


def test_the_checker_finds_faults(schemas: dict[str, Any]) -> None:
    model = {"id": "a", "object": "model", "created": 1, "owned_by": "b"}
    assert faults(model, schemas["Model"], schemas) == []
    for name, wrong in (("created", None), ("created", "1"), ("object", "list"), ("created", True)):
        assert faults({**model, name: wrong}, schemas["Model"], schemas)
    assert faults({}, schemas["Model"], schemas)


FIELDS: list[dict[str, Any]] = [
    {},
    {"n": 2},
    {"stop": "w"},
    {"max_tokens": 0},
    {"seed": 3, "user": "u", "metadata": {}},
    {"temperature": 0},
]


@pytest.mark.parametrize("fields", [*FIELDS, {"logprobs": 0}, {"logprobs": 5}, {"echo": True}])
@pytest.mark.parametrize("usage", [False, True])
def test_completions(complete: Any, read_events: Any, schemas: Any, fields: dict[str, Any], usage: bool) -> None:
    schema = schemas["CreateCompletionResponse"]
    assert faults(complete(**fields).json(), schema, schemas) == []
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = read_events(complete(stream=True, **options, **fields).text)[:-1]
    assert chunks
    for chunk in chunks:
        if chunk.get("usage", 0) is None:
            del chunk["usage"]
        for choice in chunk["choices"]:
            if choice["finish_reason"] is None:
                choice["finish_reason"] = "stop"
        assert faults(chunk, schema, schemas) == []


@pytest.mark.parametrize("fields", [*FIELDS, {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}])
@pytest.mark.parametrize("usage", [False, True])
def test_chat(chat: Any, read_events: Any, schemas: Any, fields: dict[str, Any], usage: bool) -> None:
    assert faults(chat(**fields).json(), schemas["CreateChatCompletionResponse"], schemas) == []
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = read_events(chat(stream=True, **options, **fields).text)[:-1]
    assert chunks
    for chunk in chunks:
        assert faults(chunk, schemas["CreateChatCompletionStreamResponse"], schemas) == []


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALLING: list[dict[str, Any]] = [
    {},
    {"tools": TOOLS},
    {"tools": TOOLS, "tool_choice": "required"},
    {"tools": TOOLS, "logprobs": True, "top_logprobs": 1},
    {"tools": TOOLS, "max_tokens": 40},
    {"service_tier": "priority"},
]


@pytest.mark.parametrize("fields", CALLING)
def test_reasoning_and_calls(
    think: Any, engine: Any, tagged: Any, read_events: Any, schemas: Any, fields: dict[str, Any]
) -> None:
    engine.reply = tagged('Hm.\n</think>\n\n\n<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>\n')
    assert faults(think(**fields).json(), schemas["CreateChatCompletionResponse"], schemas) == []
    for chunk in read_events(think(stream=True, **fields).text)[:-1]:
        assert faults(chunk, schemas["CreateChatCompletionStreamResponse"], schemas) == []


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scored_prompts(complete: Any, read_events: Any, schemas: Any, max_tokens: int) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": max_tokens}
    bodies = [complete(**fields).json(), *read_events(complete(stream=True, **fields).text)[:-1]]
    for body in bodies:
        for choice in body["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
            for values, instead in (("token_logprobs", 0.0), ("top_logprobs", {})):
                if choice["logprobs"] and choice["logprobs"][values][:1] == [None]:
                    choice["logprobs"][values][0] = instead
        assert faults(body, schemas["CreateCompletionResponse"], schemas) == []


def test_models(call: Any, schemas: Any) -> None:
    assert faults(call("GET", "/v1/models").json(), schemas["ListModelsResponse"], schemas) == []
    assert faults(call("GET", "/v1/models/ernie").json(), schemas["Model"], schemas) == []


def test_errors(complete: Any, engine: Any, read_events: Any, schemas: Any) -> None:
    schema = schemas["ErrorResponse"]
    assert faults(complete(n=129).json(), schema, schemas) == []
    assert faults(complete(model="x").json(), schema, schemas) == []
    engine.break_after = 2
    assert faults(read_events(complete(stream=True).text)[-1], schema, schemas) == []


class CostlyMeter(FreeMeter):
    """Tells a cost."""

    charges = True

    def settle(self, reservation: Reservation, usage: Usage, status: Status, **more: Any) -> Charging:
        charging = Charging()
        charging.end(Charge(Nano(21_000), usage, 1))
        return charging


PLACES: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": "Hi"}, "CreateCompletionResponse"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, "CreateChatCompletionResponse"),
]


@pytest.mark.parametrize(("path", "fields", "schema"), PLACES, ids=[path for path, *_ in PLACES])
def test_answers_that_tell_a_cost(call_with: Any, schemas: Any, path: str, fields: dict[str, Any], schema: str) -> None:
    response = call_with(meter=CostlyMeter())("POST", path, json={"model": "ernie", **fields})
    assert b'"cost":0.000021,"cost_nano_usd":21000' in response.content
    assert faults(response.json(), schemas[schema], schemas) == []
