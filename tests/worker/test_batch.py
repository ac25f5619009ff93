"""The tensors of a step say where each token stands."""

import random

import pytest
import torch

from ernie_serve.messages import PlanRow, SamplingParams, StepPlan
from ernie_serve.worker.batch import BatchBuilder, num_scored

SAMPLING = SamplingParams(max_tokens=1, seed=0)


def row(name, start, count, blocks, wants_token=True, scored=()):
    return PlanRow(
        request_id=name,
        token_ids=[100 * start + i for i in range(count)],
        start=start,
        block_ids=blocks,
        sampling=SAMPLING,
        wants_token=wants_token,
        prompt_token_ids=list(scored),
        output_token_ids=[],
        wants_prompt_logprobs=bool(scored),
    )


@pytest.fixture
def builder():
    return BatchBuilder(4, torch.device("cpu"), max_requests=3)


def test_rows_are_flattened_one_after_the_other(builder):
    batch = builder.build(
        StepPlan(0, [row("a", 0, 3, [7]), row("b", 5, 4, [2, 9, 4], wants_token=False), row("c", 8, 1, [1, 3, 0, 6])])
    )
    layout = batch.layout
    assert batch.ids.tolist() == [0, 1, 2, 500, 501, 502, 503, 800]
    assert layout.positions.tolist() == [0, 1, 2, 5, 6, 7, 8, 8]
    assert layout.slots.tolist() == [28, 29, 30, 37, 38, 39, 16, 0]
    assert layout.query_starts.tolist() == [0, 3, 7, 8]
    assert layout.context_lens.tolist() == [3, 9, 9]
    assert layout.block_tables.tolist() == [[7, 0, 0], [2, 9, 4], [1, 3, 0]]
    assert [(s.query_start, s.query_len, s.context_len, s.start) for s in layout.spans] == [
        (0, 3, 3, 0),
        (3, 4, 9, 5),
        (7, 1, 9, 8),
    ]
    assert batch.logit_indices.tolist() == [2, 7]
    assert [r.request_id for r in batch.sampled_rows] == ["a", "c"]


def test_the_last_tokens_of_rows_that_want_one_have_a_layout_of_their_own(builder):
    rows = [row("a", 0, 3, [7]), row("b", 5, 4, [2, 9, 4], wants_token=False), row("c", 8, 1, [1, 3, 0, 6])]
    ends = builder.build(StepPlan(0, rows)).ends
    assert ends.tokens.tolist() == [2, 7]
    layout = ends.layout
    assert layout.positions.tolist() == [2, 8]
    assert layout.slots.tolist() == [30, 0]
    assert layout.block_tables.tolist() == [[7, 0, 0], [1, 3, 0]]
    assert layout.query_starts.tolist() == [0, 1, 2]
    assert layout.context_lens.tolist() == [3, 9]
    assert [(s.query_start, s.query_len, s.context_len) for s in layout.spans] == [(0, 1, 3), (1, 1, 9)]
    assert builder.build(StepPlan(0, rows[1:2])).ends.tokens.tolist() == []
    assert builder.build(StepPlan(0, rows[2:])).ends is None  # every token is the last of its row
    assert builder.build(StepPlan(0, [*rows[1:], row("d", 0, 2, [5], scored=[0, 1])])).ends is None


def test_blocks_that_follow_one_another_are_known_as_a_run(builder):
    layout = builder.build(
        StepPlan(0, [row("a", 8, 1, [3, 4, 5, 9]), row("b", 5, 1, [3, 2]), row("c", 0, 1, [8])])
    ).layout
    assert layout.first_blocks == [3, None, 8]


def test_tables_follow_growth_preemption_and_forgetting(builder):
    chance, tables, lens = random.Random(0), {}, {}
    for _ in range(300):
        names = chance.sample("abcdef", chance.randint(1, 6))
        for name in names:
            if name not in tables or chance.random() < 0.1:  # new, or preempted: other blocks, maybe fewer
                tables[name], lens[name] = [], 0
            lens[name] += chance.randint(1, 30)
            while 4 * len(tables[name]) < lens[name]:
                tables[name].append(chance.randrange(1000))
            if chance.random() < 0.1:
                tables[name][chance.randrange(len(tables[name]))] = 5000
        layout = builder.build(StepPlan(0, [row(name, lens[name] - 1, 1, tables[name]) for name in names])).layout
        for name, table, slot in zip(names, layout.block_tables.tolist(), layout.slots.tolist(), strict=True):
            last = lens[name] - 1
            assert table[: len(tables[name])] == tables[name]
            assert slot == tables[name][last // 4] * 4 + last % 4
    assert len(builder._tables) == 3


def test_blocks_beyond_what_the_step_needs_are_allowed(builder):
    layout = builder.build(StepPlan(0, [row("a", 0, 2, [5, 6, 7])])).layout
    assert layout.block_tables.tolist() == [[5]]


def test_rows_to_be_scored_yield_logits_for_every_token_with_a_successor_in_the_prompt(builder):
    prompt = list(range(9))
    rows = [
        row("whole", 0, 9, [1, 2, 3], scored=prompt),
        row("decode", 20, 1, [4] * 6),
        row("middle", 4, 3, [5, 6], wants_token=False, scored=prompt),
        row("end", 7, 2, [7, 8, 9], scored=prompt),
    ]
    batch = builder.build(StepPlan(0, rows))
    assert batch.logit_indices.tolist() == [8, 9, 14, *range(8), *range(10, 13), 13]
    assert [r.request_id for r in batch.sampled_rows] == ["whole", "decode", "end"]
    assert [(r.request_id, num_scored(r)) for r in batch.scored_rows] == [("whole", 8), ("middle", 3), ("end", 1)]
