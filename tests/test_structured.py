"""The whole engine on weights that know nothing: what is bound is right at any temperature, what is free stays so."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from ernie_serve.config import Settings
from ernie_serve.engine.core import EngineCore
from ernie_serve.engine_process import build_engine
from ernie_serve.grammar.tools import Framing, tool_grammar
from ernie_serve.messages import EngineRequest, Grammar, SamplingParams
from ernie_serve.model.random_checkpoint import write_random_checkpoint
from ernie_serve.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "size": {"enum": ["small", "large"]},
        "many": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 5}, "maxItems": 3},
        "word": {"type": "string", "pattern": "^[a-z]{1,6}$"},
    },
    "required": ["size", "many", "word"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("structured") / "tiny"
    write_random_checkpoint(folder, "tiny")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def engine(folder: Path, tokenizer: Tokenizer) -> EngineCore:
    settings = Settings(model=str(folder), device="cpu", threads=1, kv_cache_memory_bytes=32 << 20, max_model_len=512)
    return build_engine(settings, tokenizer.vocab_size, lambda share, what: None)[0]


def run(engine: EngineCore, tokenizer: Tokenizer, **requests: SamplingParams) -> dict[str, tuple[str, str]]:
    """The text and the finish reason of requests that run together."""
    ids: dict[str, list[int]] = {name: [] for name in requests}
    reasons: dict[str, str] = {}
    for name, sampling in requests.items():
        engine.add(EngineRequest(request_id=name, prompt_token_ids=tokenizer.encode(f"Say {name}"), sampling=sampling))
    while engine.has_work:
        for output in engine.step():
            assert not output.error
            ids[output.request_id] += output.token_ids
            reasons[output.request_id] = output.finish_reason or ""
    return {name: (tokenizer.decode(ids[name], skip_special_tokens=False), reasons[name]) for name in requests}


def sampling(temperature: float, seed: int, **options: Any) -> SamplingParams:
    options = {"max_tokens": 200, "stop_token_ids": (2,)} | options
    return SamplingParams(seed=seed, temperature=temperature, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 8.0])
def test_bound_answers_are_right_beside_free_ones(engine: EngineCore, tokenizer: Tokenizer, temperature: float) -> None:
    ids = {name: tokenizer.token_id(tag) for name, tag in (("begin_id", "<tool_call>"), ("end_id", "</tool_call>"))}
    calls = tool_grammar([TOOL], Framing(**ids), parallel=False)
    bound = {
        "schema": Grammar("json_schema", json.dumps(SCHEMA)),
        "regex": Grammar("regex", "[0-9]{3}-[0-9]{2}"),
        "choice": Grammar("choice", '["yes", "no", "也许"]'),
        "call": calls,
    }
    for seed in range(2):
        requests = {name: sampling(temperature, seed, grammar=grammar) for name, grammar in bound.items()}
        free = sampling(temperature, seed, max_tokens=30)
        said, alone = run(engine, tokenizer, free=free, **requests), run(engine, tokenizer, free=free)
        assert said["free"] == alone["free"]
        assert {said[name][1] for name in bound} == {"stop"}
        Draft202012Validator(SCHEMA).validate(json.loads(said["schema"][0]))
        assert re.fullmatch("[0-9]{3}-[0-9]{2}", said["regex"][0])
        assert said["choice"][0] in ("yes", "no", "也许")
        call = re.fullmatch(r"\n{0,3}<tool_call>\n(.*)\n</tool_call>\n", said["call"][0], re.DOTALL)
        assert call
        parsed = json.loads(call[1])
        assert parsed["name"] == "look_up"
        Draft202012Validator(SCHEMA).validate(parsed["arguments"])


def test_a_call_is_forced_behind_reasoning_whose_budget_ends(engine: EngineCore, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_id("</think>")
    assert end is not None
    forced = tuple(tokenizer.encode("\n</think>\n\n"))
    options: dict[str, Any] = {
        "grammar": Grammar("choice", '["yes", "no"]'),
        "grammar_after_token_id": end,
        "max_reasoning_tokens": 12,
        "reasoning_end_token_id": end,
        "reasoning_end_forced_ids": forced,
    }
    for seed in range(3):
        text, reason = run(engine, tokenizer, r=sampling(1.0, seed, **options))["r"]
        assert reason == "stop"
        assert text.split("</think>")[-1].strip() in ("yes", "no")


def test_padding_of_the_vocabulary_is_never_said(engine: EngineCore, tokenizer: Tokenizer) -> None:
    said = run(engine, tokenizer, r=sampling(50.0, 1, grammar=Grammar("regex", "(?s:.){40}")))
    assert len(said["r"][0]) == 40
