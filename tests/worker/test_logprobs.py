"""Logprobs are log_softmax, however many rows are worked on at once."""

import pytest
import torch

from ernie_serve.worker.logprobs import logprobs_of, scores_of

V = 50


def logits_for(rows):
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(rows))


def test_each_row_gets_as_many_alternatives_as_it_wants():
    logits = logits_for(3)
    found = logprobs_of(logits, [4, 5, 6], [2, None, 0])
    logs = logits.log_softmax(-1)
    assert list(found) == [0, 2]
    assert [i for i, _ in found[0].top] == logs[0].topk(2).indices.tolist()
    assert found[2].top == []
    assert found[2].logprob == pytest.approx(logs[2, 6].item())
    assert logprobs_of(logits, [4, 5, 6], [None] * 3) == {}


@pytest.mark.parametrize("rows", [0, 1, 64, 65, 200])
def test_many_rows_are_scored_in_parts(rows):
    logits = logits_for(rows)
    token_ids = [(7 * i) % V for i in range(rows)]
    scores = scores_of(logits, token_ids, 3)
    assert [s.token_id for s in scores] == token_ids
    logs = logits.log_softmax(-1)
    assert [s.logprob for s in scores] == pytest.approx([logs[i, t].item() for i, t in enumerate(token_ids)])
    assert all(len(s.top) == 3 for s in scores)


def test_half_precision_is_read_in_single():
    logits = logits_for(4).bfloat16()
    logs = logits.float().log_softmax(-1)
    assert [s.logprob for s in scores_of(logits, [1, 2, 3, 4], 0)] == pytest.approx(
        [logs[i, i + 1].item() for i in range(4)]
    )
