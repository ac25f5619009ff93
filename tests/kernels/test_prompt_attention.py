"""The parts are played by a CPU; which operator gets which lengths, and how they are joined, is what is held here."""

import functools
import math
from itertools import accumulate

import pytest
import torch

from ernie_serve.kernels import prompt_attention
from ernie_serve.kernels.layout import Run, Span

UNIT, BLOCK = 8, 32
H, K, D = 4, 2, 16


def played(q, k, v, is_causal=False):
    """Attention of [1, heads, tokens, D] and its log-sums, in float32."""
    keys, values = (x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q.float() @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ values).to(q.dtype), scores.logsumexp(-1, keepdim=True)


@pytest.fixture
def planned(monkeypatch):
    """The pairs of lengths that cuDNN was given, on a card that prefers it."""
    lengths = []

    def by_cudnn(q, k, v, is_causal=False):
        lengths.append((q.shape[2], k.shape[2]))
        return played(q, k, v, is_causal)

    def by_flash(q, k, v):
        out, log = played(q, k, v)
        return out, log[..., 0]

    def sdpa(q, k, v, *, is_causal=False, attn_mask=None, enable_gqa=False):
        assert is_causal == (q.shape[2] == k.shape[2])
        assert not torch.backends.cuda.cudnn_sdp_enabled(), "it would make a plan for any length"
        return whole(*(x[0].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)[None]

    monkeypatch.setattr(prompt_attention, "UNIT", UNIT)
    monkeypatch.setattr(prompt_attention, "BLOCK", BLOCK)
    monkeypatch.setattr(prompt_attention, "prefers_cudnn", lambda device: True)
    monkeypatch.setattr(prompt_attention, "_by_cudnn", by_cudnn)
    monkeypatch.setattr(prompt_attention, "_by_flash", by_flash)
    monkeypatch.setattr(prompt_attention.F, "scaled_dot_product_attention", sdpa)
    for checked in (prompt_attention._joins_well, prompt_attention._runs_well):
        checked.cache_clear()
    yield lengths
    for checked in (prompt_attention._joins_well, prompt_attention._runs_well):
        checked.cache_clear()


def whole(q, keys, values):
    """All tokens of a text, of which the last are asked for: [T, H, D]."""
    first = torch.zeros(len(keys) - len(q), *q.shape[1:], dtype=q.dtype)
    every = (torch.cat((first, q)), keys, values)
    out, _ = played(*(x.transpose(0, 1)[None] for x in every), is_causal=True)
    return out[0].transpose(0, 1)[len(first) :]


def text(tokens, before, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens + 100 * before)
    return [
        torch.randn(n, heads, D, generator=generator).to(dtype)
        for n, heads in ((tokens, H), (tokens + before, K), (tokens + before, K))
    ]


def attend(q, keys, values):
    """One text, as a run of its own."""
    starts = (torch.tensor([0, len(x)], dtype=torch.int32) for x in (q, keys))
    return prompt_attention.attend(
        q, keys, values, Run((Span(0, len(q), len(keys)),), torch.arange(len(keys)), *starts)
    )


@pytest.mark.parametrize("before", [0, 1, 31, 32, 33, 96, 100])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 13, 16, 31, 32])
def test_parts_that_are_joined_are_the_whole(planned, tokens, before):
    args = text(tokens, before)
    torch.testing.assert_close(attend(*args), whole(*args), rtol=1e-4, atol=1e-5)


def test_cudnn_meets_few_lengths_and_none_that_filling_up_would_double(planned):
    prompt_attention.meet(torch.device("cpu"), torch.float32, H, K, D, 32)
    assert planned == [], "float32 is not for cuDNN"
    prompt_attention.meet(torch.device("cpu"), torch.bfloat16, H, K, D, 32)
    units = {8, 16, 24, 32}
    met = {(n, n) for n in units} | {(n, BLOCK) for n in units}
    assert set(planned) == met
    for tokens in range(1, 33):
        for before in (0, 5, 32, 70):
            attend(*text(tokens, before, torch.bfloat16))
    assert set(planned) == met, "a start has met all"
    planned.clear()
    for tokens in (1, 7, 9, 12, 17):
        attend(*text(tokens, 40))
    assert planned == []


@pytest.mark.parametrize(("most", "lengths"), [(7, set()), (8, {8}), (9, {8}), (13, {8, 16}), (32, {8, 16, 24, 32})])
def test_a_start_plans_no_length_that_none_of_its_pieces_is_filled_up_to(planned, most, lengths):
    prompt_attention.meet(torch.device("cpu"), torch.bfloat16, H, K, D, most)
    assert {q for q, _ in planned} == lengths


def test_memory_that_runs_out_is_not_taken_for_a_fault_of_the_operators(planned, monkeypatch):
    def full(*args, **named):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(prompt_attention, "_by_cudnn", full)
    with pytest.raises(torch.OutOfMemoryError):
        prompt_attention.meet(torch.device("cpu"), torch.bfloat16, H, K, D, 16)


def test_on_other_cards_nothing_is_planned(planned, monkeypatch):
    monkeypatch.setattr(prompt_attention, "prefers_cudnn", lambda device: False)
    for before in (0, 40):
        args = text(16, before)
        torch.testing.assert_close(attend(*args), whole(*args), rtol=1e-4, atol=1e-5)
    assert planned == []
    assert torch.backends.cuda.cudnn_sdp_enabled(), "as it was"


@pytest.mark.parametrize("fault", ["wrong", "raises", "nan"])
def test_operators_that_do_not_give_the_whole_are_told_and_not_used(planned, monkeypatch, caplog, fault):
    def faulty(q, k, v, is_causal=False):
        if fault == "raises":
            raise RuntimeError("no such plan")
        out, log = played(q, k, v, is_causal)
        return out, log * (1.4427 if fault == "wrong" else float("nan"))  # as logarithms to base 2

    monkeypatch.setattr(prompt_attention, "_by_cudnn", faulty)
    args = text(16, 40)
    torch.testing.assert_close(attend(*args), whole(*args), rtol=1e-4, atol=1e-5)
    assert "Pieces of prompts of 16 tokens take flash attention" in caplog.text


def test_half_precision_is_joined_in_float32(planned):
    args = text(32, 100, torch.bfloat16)
    want = whole(*(x.float() for x in args))
    torch.testing.assert_close(attend(*args).float(), want, rtol=0.02, atol=0.02)


def neighbours():
    """Three texts of a step, behind a token that is none of theirs, as a run."""
    lens, contexts = [5, 7, 3], [5, 30, 9]
    spans = tuple(Span(1 + sum(lens[:i]), *each) for i, each in enumerate(zip(lens, contexts, strict=True)))
    starts = [torch.tensor([0, *accumulate(each)], dtype=torch.int32) for each in (lens, contexts)]
    texts = [text(n, length - n) for n, length in zip(lens, contexts, strict=True)]
    want = torch.cat([whole(*each) for each in texts])
    return [torch.cat(parts) for parts in zip(*texts, strict=True)], Run(spans, torch.arange(44), *starts), want


@pytest.mark.parametrize("fault", ["none", "wrong", "raises"])
def test_texts_that_an_operator_does_not_take_end_to_end_are_told_and_taken_one_by_one(
    planned, monkeypatch, caplog, fault
):
    calls = []

    def by_runs(q, keys, values, run):
        calls.append(len(run.spans))
        if fault == "raises":
            raise RuntimeError("unexpected argument")
        return prompt_attention._one_by_one(q, keys, values, run) * (1.1 if fault == "wrong" else 1)

    monkeypatch.setattr(prompt_attention, "takes_runs", lambda device: True)
    monkeypatch.setattr(prompt_attention, "_by_runs", by_runs)
    args, run, want = neighbours()
    for _ in range(2):
        torch.testing.assert_close(prompt_attention.attend(*args, run), want, rtol=1e-4, atol=1e-5)
    assert len(calls) == (3 if fault == "none" else 1), "a check, and what it allows"
    assert ("Each prompt of a step is a call of its own" in caplog.text) == (fault != "none")


def test_a_few_tokens_alone_behind_many_are_not_taken_end_to_end(planned, monkeypatch):
    """There flash attention splits the context between processors, and elsewhere it does not."""
    monkeypatch.setattr(prompt_attention, "takes_runs", lambda device: True)
    monkeypatch.setattr(prompt_attention, "_runs_well", functools.cache(lambda *_: True))
    monkeypatch.setattr(prompt_attention, "_by_runs", None)
    args = text(5, 300)
    torch.testing.assert_close(attend(*args), whole(*args), rtol=1e-4, atol=1e-5)


def test_the_operator_that_takes_texts_end_to_end_is_asked_for_the_tokens_before_each_one(monkeypatch):
    """On no device at all: it exists on a GPU alone, but its arguments and its result's shape are checked."""
    asked = []
    operator = torch.ops.aten._flash_attention_forward

    def noted(*args, **named):
        asked.append(args[5:])
        return operator(*args, **named)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", noted)
    args, run, want = neighbours()
    starts = (run.query_starts.to("meta"), run.context_starts.to("meta"))
    run = Run(run.spans, run.slots.to("meta"), *starts)
    got = prompt_attention._by_runs(*(each.to("meta", torch.bfloat16) for each in args), run)
    assert got.shape == want.shape
    assert asked == [(7, 30, 0.0, True, False)], "longest texts, no dropout, causal"
