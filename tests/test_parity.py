"""The whole engine, from a checkpoint folder to tokens, against what transformers finds likeliest.

However the scheduler cuts, mixes, preempts or reuses work, the tokens are those of the reference.
"""

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ernie_serve.config import Settings
from ernie_serve.engine.core import EngineCore
from ernie_serve.engine_process import build_engine
from ernie_serve.kernels.cpu import multiplies_in_panels
from ernie_serve.kernels.native import operators
from ernie_serve.messages import EngineRequest, SamplingParams

VOCAB_SIZE = 640
SAMPLED = {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.2}
NEW_TOKENS = 16


def _prompts(count: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, VOCAB_SIZE) for _ in range(chance.randint(1, 40))] for _ in range(count)]


def _engine(folder: Path, num_valid_ids: int = VOCAB_SIZE, **settings: Any) -> EngineCore:
    chosen = {
        "dtype": "float32",
        "kv_cache_memory_bytes": 4 << 20,
        "max_model_len": 128,
        "device": "cpu",
        "threads": 1,
    } | settings
    core, _ = build_engine(Settings(model=str(folder), **chosen), num_valid_ids, lambda share, what: None)
    return core


def _generate(core: EngineCore, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
    """The tokens of all prompts, run together."""
    texts: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        params = SamplingParams(**({"max_tokens": NEW_TOKENS, "seed": index, "temperature": 0.0} | sampling))
        core.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, sampling=params))
        texts[str(index)] = []
    while core.has_work:
        for output in core.step():
            assert output.finish_reason in (None, "length"), output.error
            texts[output.request_id] += output.token_ids
    stats = core.scheduler.stats
    assert stats.blocks_used == 0
    assert stats.blocks_used + stats.blocks_cached + stats.blocks_free == stats.num_blocks
    return list(texts.values())


def test_twenty_prompts_continue_as_transformers_continues_them(every_checkpoint: Path) -> None:
    """A text is the greedy one if and only if each of its tokens is the most likely after all before it."""
    prompts = _prompts(20, seed=1)
    texts = _generate(_engine(every_checkpoint), prompts)
    model = AutoModelForCausalLM.from_pretrained(every_checkpoint, dtype=torch.float32).eval()
    for prompt, text in zip(prompts, texts, strict=True):
        assert len(text) == NEW_TOKENS
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + text])).logits[0]
        assert text == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_both_published_layouts_give_the_same_tokens(make_checkpoint: Any) -> None:
    prompts = _prompts(6, seed=2)
    pt, paddle = (make_checkpoint("21b-like", layout=layout) for layout in ("pt", "paddle"))
    assert _generate(_engine(pt), prompts) == _generate(_engine(paddle), prompts)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("one at a time", {"max_num_seqs": 1}),
        ("prompts in pieces of three", {"max_num_batched_tokens": 3}),
        ("blocks of one token", {"block_size": 1}),
        (
            "a cache for two requests, so that others are preempted",
            {"kv_cache_memory_bytes": 7 * 16 * 768, "max_model_len": 64},
        ),
        ("no prefix cache", {"enable_prefix_caching": False}),
    ],
)
@pytest.mark.parametrize(("dtype", "sampling"), [("float32", {}), ("float32", SAMPLED), ("bfloat16", SAMPLED)])
def test_the_schedule_never_changes_the_text(
    tiny_checkpoint: Path, name: str, settings: dict[str, Any], dtype: str, sampling: dict[str, Any]
) -> None:
    _require_panels(dtype)
    prompts = _prompts(8, seed=3)
    if dtype == "bfloat16" and "kv_cache_memory_bytes" in settings:  # numbers of half the size
        settings = settings | {"kv_cache_memory_bytes": settings["kv_cache_memory_bytes"] // 2}
    core = _engine(tiny_checkpoint, **settings, dtype=dtype)
    disturbed = _generate(core, prompts, **sampling)
    assert disturbed == _undisturbed(tiny_checkpoint, dtype, tuple(sampling.items()))
    assert ("preempted" in name) == (core.scheduler.stats.num_preempted > 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cached_prefix_changes_nothing(tiny_checkpoint: Path, dtype: str) -> None:
    _require_panels(dtype)
    shared = _prompts(1, seed=4)[0] * 3
    prompts = [shared[:60] + tail for tail in _prompts(4, seed=5)]
    core = _engine(tiny_checkpoint, dtype=dtype)
    first = _generate(core, prompts[:1])
    again = _generate(core, prompts)
    assert core.scheduler.stats.blocks_cached > 3
    assert again[:1] == first
    assert again == _generate(_engine(tiny_checkpoint, enable_prefix_caching=False, dtype=dtype), prompts)


@functools.cache
def _undisturbed(folder: Path, dtype: str, sampling: tuple[tuple[str, float], ...]) -> list[list[int]]:
    """The text of the same prompts where nothing is in their way."""
    return _generate(_engine(folder, dtype=dtype), _prompts(8, seed=3), **dict(sampling))


def _require_panels(dtype: str) -> None:
    """In bfloat16 the text is the same to the last token where our own operators multiply."""
    if dtype == "bfloat16" and (not multiplies_in_panels(torch.bfloat16) or operators() is None):
        pytest.skip("needs a compiler, and a processor without instructions for bfloat16")


@pytest.mark.parametrize("num_valid_ids", [VOCAB_SIZE, 500], ids=["full", "padded"])
def test_prompts_are_scored_as_transformers_scores_them(make_checkpoint: Any, num_valid_ids: int) -> None:
    """Harnesses send `max_tokens` 0 and read nothing but these; chunks and cached beginnings change nothing.

    Where a tokenizer has fewer ids than the vocabulary, the others have their share, and are never listed.
    """
    folder = make_checkpoint("21b-like")
    prompts = [[token % num_valid_ids for token in prompt] for prompt in _prompts(8, seed=5)]
    core = _engine(folder, num_valid_ids, max_num_batched_tokens=11)
    scores: dict[str, list[Any]] = {}
    for times in range(2):
        for index, prompt in enumerate(prompts):
            sampling = SamplingParams(max_tokens=times, seed=0, prompt_logprobs=2)
            core.add(EngineRequest(request_id=f"{times} {index}", prompt_token_ids=prompt, sampling=sampling))
        while core.has_work:
            for output in core.step():
                assert output.finish_reason in (None, "length"), output.error
                scores.setdefault(output.request_id, []).extend(output.prompt_logprobs)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for index, prompt in enumerate(prompts):
        with torch.inference_mode():
            logs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for times in range(2):
            told = scores[f"{times} {index}"]
            assert [each.token_id for each in told] == prompt[1:]
            expected = [logs[at, token].item() for at, token in enumerate(prompt[1:])]
            assert [each.logprob for each in told] == pytest.approx(expected, abs=1e-3)
            assert [each.top[0][0] for each in told] == logs[: len(prompt) - 1, :num_valid_ids].argmax(-1).tolist()
