"""However a text is cut into steps, batched and moved about in the cache, its tokens are the same."""

import random

import msgspec
import pytest
import torch

from ernie_serve.messages import StepPlan, TokenMasks
from ernie_serve.worker.memory import bytes_per_block
from ernie_serve.worker.runner import Runner

NUM_TOKENS = 7
BLOCK = 4


@pytest.fixture
def runner(tiny_model):
    return Runner(tiny_model, 64, BLOCK)


@pytest.fixture
def alone(tiny_model, step):
    """What a text yields by itself: the prompt at once, then token by token, all in one block."""

    def run(text):
        runner, pool, seen = Runner(tiny_model, 1, 64), [0], []
        for _ in range(NUM_TOKENS):
            seen.append(step(runner, {text: text.row(pool, 64)})[text.name])
        return seen

    return run


def shuffled(num_blocks, seed=0):
    pool = list(range(num_blocks))
    random.Random(seed).shuffle(pool)
    return pool


def agree(seen, expected):
    assert [s.token_id for s in seen] == [s.token_id for s in expected]
    for a, b in zip(seen, expected, strict=True):
        assert a.logprobs.logprob == pytest.approx(b.logprobs.logprob, abs=1e-4)
        assert [i for i, _ in a.logprobs.top] == [i for i, _ in b.logprobs.top]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 5, "top_p": 0.9, "frequency_penalty": 0.3}])
@pytest.mark.parametrize("length", [1, 4, 21])
def test_scattered_blocks_yield_what_one_block_yields(runner, step, alone, make_text, length, sampling):
    text, pool = make_text(length, **sampling), shuffled(64)
    seen = [step(runner, {text: text.row(pool, BLOCK)})["a"] for _ in range(NUM_TOKENS)]
    agree(seen, alone(make_text(length, **sampling)))


def test_the_last_layer_gets_a_row_for_each_text_that_is_asked_and_none_where_nobody_is(
    runner, tiny_model, step, make_text, monkeypatch
):
    counts = []
    linear = tiny_model.kernels.linear

    def counted(x, weight):
        if weight is tiny_model.layers[-1].self_attn.o_proj.weight:
            counts.append(len(x))
        return linear(x, weight)

    monkeypatch.setattr(tiny_model.kernels, "linear", counted, raising=False)
    pool, a, b = shuffled(64), make_text(9, "a"), make_text(12, "b")
    step(runner, {a: a.row(pool, BLOCK, 5), b: b.row(pool, BLOCK, 5)})
    assert counts == []
    step(runner, {a: a.row(pool, BLOCK), b: b.row(pool, BLOCK, 3)})
    step(runner, {a: a.row(pool, BLOCK), b: b.row(pool, BLOCK)})
    assert counts == [1, 2]


@pytest.mark.parametrize("chunk", [1, 3, 4, 13])
def test_a_prompt_in_chunks_yields_what_it_yields_at_once(runner, step, alone, make_text, chunk):
    text, pool, seen = make_text(21), shuffled(64), []
    for _ in range(21 // chunk + NUM_TOKENS + 1):
        seen += step(runner, {text: text.row(pool, BLOCK, chunk)}).values()
    agree(seen[:NUM_TOKENS], alone(make_text(21)))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.1, "min_p": 0.02, "presence_penalty": 0.5}])
def test_texts_of_many_lengths_in_one_batch_yield_what_each_yields_alone(runner, step, alone, make_text, sampling):
    lengths = {"a": 3, "b": 30, "c": 1, "d": 12, "e": 5}
    texts = [make_text(length, name, **sampling) for name, length in lengths.items()]
    pool, chance, seen = shuffled(64), random.Random(1), {name: [] for name in lengths}
    for _ in range(60):
        chosen = chance.sample(texts, chance.randint(1, 5))  # prompts, chunks and decodes side by side
        rows = {t: t.row(pool, BLOCK, chance.randint(1, 9)) for t in chosen if len(seen[t.name]) < NUM_TOKENS}
        if rows:
            for name, sampled in step(runner, rows).items():
                seen[name].append(sampled)
    for name, length in lengths.items():
        agree(seen[name], alone(make_text(length, name, **sampling)))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "repetition_penalty": 1.3, "top_k": 20}])
def test_a_preempted_text_goes_on_as_if_undisturbed(runner, step, alone, make_text, sampling):
    text, other, pool, seen = make_text(9, **sampling), make_text(30, "other"), shuffled(64), []
    for number in range(NUM_TOKENS):
        if number in (2, 3, 5):
            text.preempt(pool)
            pool.reverse()
            step(runner, {other: other.row(pool, BLOCK, 4)})  # takes the blocks that were given back
        while not (sampled := step(runner, {text: text.row(pool, BLOCK, 6)})):
            pass
        seen += sampled.values()
    agree(seen, alone(make_text(9, **sampling)))


def test_a_text_that_comes_back_in_other_blocks_at_the_same_start_reads_the_other_blocks(runner, step, make_text):
    first, pool = make_text(8), shuffled(64)
    step(runner, {first: first.row(pool, BLOCK)})
    twin, moved = make_text(8, "a"), make_text(8, "b")
    moved.prompt = twin.prompt
    expected = step(runner, {moved: moved.row(pool, BLOCK)})["b"]
    pool.extend(first.blocks)
    other = make_text(8, "c")
    step(runner, {other: other.row(pool, BLOCK)})  # overwrites the first blocks
    twin.output, twin.blocks, twin.computed = list(first.output), moved.blocks[:], 8
    moved.computed = 8
    assert (
        step(runner, {twin: twin.row(pool, BLOCK)})["a"].token_id
        == step(runner, {moved: moved.row(pool, BLOCK)})["b"].token_id
    )
    assert expected.token_id == first.output[0]


def test_a_cached_prefix_yields_what_computing_it_yields(runner, step, alone, make_text):
    first, pool = make_text(18, "first"), shuffled(64)
    step(runner, {first: first.row(pool, BLOCK)})
    second = make_text(18, "second")
    second.prompt = first.prompt
    second.blocks, second.computed = first.blocks[:4], 16
    seen = [step(runner, {second: second.row(pool, BLOCK)})["second"] for _ in range(NUM_TOKENS)]
    expected = make_text(18, "second")
    expected.prompt = first.prompt
    agree(seen, alone(expected))


def test_only_rows_that_want_a_token_yield_one_and_in_the_order_of_the_plan(runner, make_text):
    pool = shuffled(64)
    texts = [make_text(n, name) for n, name in ((5, "x"), (9, "y"), (2, "z"))]
    rows = [text.row(pool, BLOCK, count) for text, count in zip(texts, (5, 3, 2), strict=True)]
    assert [s.request_id for s in runner.execute(StepPlan(1, rows))] == ["x", "z"]
    assert runner.execute(StepPlan(2, [texts[1].row(pool, BLOCK, 3)])) == []


def test_the_cache_has_the_size_that_was_planned(tiny_model, tiny_config):
    num_bytes = sum(tensor.nbytes for pair in Runner(tiny_model, 10, BLOCK).cache for tensor in pair)
    assert num_bytes == 10 * bytes_per_block(tiny_config, torch.float32, BLOCK)


def test_a_step_that_is_not_wanted_any_more_ends_between_two_layers(runner, make_text, monkeypatch):
    monkeypatch.setattr("ernie_serve.worker.runner.LOOK_SECONDS", -1.0)
    asked = []

    def is_wanted():
        asked.append(len(asked))
        return len(asked) < 2

    for pair in runner.cache:
        pair[0].zero_()
    plan = StepPlan(1, [make_text(5).row(list(range(64)), BLOCK)])
    assert runner.execute(plan, None, is_wanted) == []
    assert asked == [0, 1]
    assert [bool(keys.any()) for keys, _ in runner.cache] == [True, False, False]


def test_asking_whether_a_step_is_wanted_changes_no_token(runner, make_text, monkeypatch):
    monkeypatch.setattr("ernie_serve.worker.runner.LOOK_SECONDS", -1.0)
    plan = StepPlan(1, [make_text(5).row(list(range(64)), BLOCK)])
    asked = runner.execute(plan, None, lambda: True)
    agree(asked, runner.execute(plan))


def test_no_gradient_is_recorded(runner, step, make_text):
    text, pool = make_text(3), shuffled(64)
    with torch.enable_grad():
        step(runner, {text: text.row(pool, BLOCK)})
    assert not any(t.requires_grad for pair in runner.cache for t in pair)


@pytest.mark.parametrize("chunk", [1, 5, 21])
def test_a_prompt_in_chunks_is_scored_as_the_network_scores_it_at_once(runner, tiny_model, make_text, chunk):
    text, pool, scores = make_text(21, prompt_logprobs=3), shuffled(64), []
    for _ in range(-(-21 // chunk)):
        row = msgspec.structs.replace(text.row(pool, BLOCK, chunk), wants_prompt_logprobs=True)
        [sampled] = runner.execute(StepPlan(0, [row]))
        assert (sampled.token_id == -1) == (not row.wants_token)
        scores += sampled.prompt_logprobs
    once = Runner(tiny_model, 1, 64)
    batch = once._batches.build(StepPlan(0, [make_text(21).row([0], 64)]))
    logs = tiny_model(batch.ids, batch.layout, once.cache, torch.arange(20)).log_softmax(-1)
    assert [s.token_id for s in scores] == text.prompt[1:]
    expected = [logs[i, token].item() for i, token in enumerate(text.prompt[1:])]
    assert [s.logprob for s in scores] == pytest.approx(expected, abs=1e-4)
    assert [[i for i, _ in s.top] for s in scores] == logs.topk(3).indices.tolist()


def test_scoring_one_text_leaves_the_others_as_they_were(runner, step, alone, make_text):
    scored, other, pool, seen = make_text(13, "scored", prompt_logprobs=0), make_text(9, "other"), shuffled(64), []
    for _ in range(NUM_TOKENS):
        rows = {scored: msgspec.structs.replace(scored.row(pool, BLOCK), wants_prompt_logprobs=not scored.output)}
        seen.append(step(runner, rows | {other: other.row(pool, BLOCK)})["other"])
    agree(seen, alone(make_text(9, "other")))


def test_masks_are_asked_for_when_the_network_has_run(runner, make_text):
    text, pool, asked = make_text(5), shuffled(64), []

    def masks():
        asked.append(any(bool(part.any()) for pair in runner.cache for part in pair))
        return TokenMasks(["a"], bytearray([0, 0b100, *[0] * 14]), 16)

    [sampled] = runner.execute(StepPlan(0, [text.row(pool, BLOCK)]), masks)
    assert sampled.token_id == 10
    assert asked == [True]
