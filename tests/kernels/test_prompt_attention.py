"""The parts are played by a CPU; which operator gets which lengths, and how they are joined, is what is held here."""

import math

import pytest
import torch

from ernie_serve.kernels import prompt_attention

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
    prompt_attention._joins_well.cache_clear()
    yield lengths
    prompt_attention._joins_well.cache_clear()


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


@pytest.mark.parametrize("before", [0, 1, 31, 32, 33, 96, 100])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 13, 16, 31, 32])
def test_parts_that_are_joined_are_the_whole(planned, tokens, before):
    args = text(tokens, before)
    torch.testing.assert_close(prompt_attention.attend(*args), whole(*args), rtol=1e-4, atol=1e-5)


def test_cudnn_meets_few_lengths_and_none_that_filling_up_would_double(planned):
    prompt_attention.meet(torch.device("cpu"), torch.float32, H, K, D, 32)
    assert planned == [], "float32 is not for cuDNN"
    prompt_attention.meet(torch.device("cpu"), torch.bfloat16, H, K, D, 32)
    units = {8, 16, 24, 32}
    met = {(n, n) for n in units} | {(n, BLOCK) for n in units}
    assert set(planned) == met
    for tokens in range(1, 33):
        for before in (0, 5, 32, 70):
            prompt_attention.attend(*text(tokens, before, torch.bfloat16))
    assert set(planned) == met, "a start has met all"
    planned.clear()
    for tokens in (1, 7, 9, 12, 17):
        prompt_attention.attend(*text(tokens, 40))
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
        torch.testing.assert_close(prompt_attention.attend(*args), whole(*args), rtol=1e-4, atol=1e-5)
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
    torch.testing.assert_close(prompt_attention.attend(*args), whole(*args), rtol=1e-4, atol=1e-5)
    assert "Pieces of prompts of 16 tokens take flash attention" in caplog.text


def test_half_precision_is_joined_in_float32(planned):
    args = text(32, 100, torch.bfloat16)
    want = whole(*(x.float() for x in args))
    torch.testing.assert_close(prompt_attention.attend(*args).float(), want, rtol=0.02, atol=0.02)
