"""The device chooses what the host's sampler chooses, from the same number."""

import random

import pytest
import torch

pytest.importorskip("triton")

from ernie_serve.kernels.cuda import CudaKernels
from ernie_serve.messages import PlanRow, SamplingParams, TokenMasks
from ernie_serve.worker.sampler import Sampler, uniform

pytestmark = pytest.mark.usefixtures("poison")


def both(logits: torch.Tensor, params: list[SamplingParams], num_valid_ids: int) -> tuple[list[int], list[int]]:
    """What the host's sampler chooses, and what the kernels do."""
    rows = [
        PlanRow(
            request_id=str(i), token_ids=[0], start=0, block_ids=[0], sampling=p, wants_token=True,
            prompt_token_ids=[0], output_token_ids=[],
        )
        for i, p in enumerate(params)
    ]  # fmt: skip
    want = [s.token_id for s in Sampler(8, num_valid_ids).sample(logits, rows)]
    settings = torch.tensor(
        [[uniform(p.seed, 0), p.temperature, p.top_p, p.min_p] for p in params], dtype=torch.float64
    )
    top_ks = torch.tensor([p.top_k for p in params], dtype=torch.int32)
    return want, CudaKernels().sample(logits, settings, top_ks, num_valid_ids).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_number_chooses_the_same_token(generator, dtype):
    logits = (3 * torch.randn(8, 1500, generator=generator)).to(dtype)
    params = [
        SamplingParams(max_tokens=1, seed=1, temperature=0.0),
        SamplingParams(max_tokens=1, seed=2),
        SamplingParams(max_tokens=1, seed=3, temperature=0.7),
        SamplingParams(max_tokens=1, seed=4, top_k=20),
        SamplingParams(max_tokens=1, seed=5, top_p=0.8),
        SamplingParams(max_tokens=1, seed=6, top_k=50, top_p=0.9, temperature=1.3),
        SamplingParams(max_tokens=1, seed=7, min_p=0.05, temperature=2.0),
        SamplingParams(max_tokens=1, seed=8, top_k=1, top_p=0.5, min_p=0.1),
    ]
    want, got = both(logits, params, 1490)
    assert got == want


def test_random_settings_on_coarse_scores_full_of_equals():
    chance = random.Random(5)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        logits = (4 * torch.randn(8, 300, generator=generator)).round() / 2
        params = [
            SamplingParams(
                max_tokens=1,
                seed=chance.randrange(1 << 40),
                temperature=chance.choice([0.0, 0.5, 1.0, 1.5]),
                top_k=chance.choice([0, 1, 7, 100, 299, 300]),
                top_p=chance.choice([1.0, 0.95, 0.5, 0.01]),
                min_p=chance.choice([0.0, 0.0, 0.1]),
            )
            for _ in range(8)
        ]
        want, got = both(logits, params, 300)
        assert got == want


def test_ids_beyond_the_valid_ones_are_never_chosen(generator):
    logits = torch.zeros(2, 64)
    logits[:, 40:] = 50.0
    params = [SamplingParams(max_tokens=1, seed=s, temperature=t) for s, t in ((1, 0.0), (2, 1.0))]
    want, got = both(logits, params, 40)
    assert got == want
    assert max(got) < 40


def test_the_sampler_draws_with_the_kernel_what_it_chooses_itself(generator):
    """With bias, a mask and penalties, which come before the choice."""
    logits = 3 * torch.randn(4, 700, generator=generator)
    params = [
        SamplingParams(max_tokens=9, seed=1, temperature=0.0, logit_bias={17: 50.0}),
        SamplingParams(max_tokens=9, seed=2, top_p=0.9, logit_bias={5: -100.0}),
        SamplingParams(max_tokens=9, seed=3, presence_penalty=2.0, top_k=30),
        SamplingParams(max_tokens=9, seed=4, repetition_penalty=1.5, min_p=0.02),
    ]
    rows = [
        PlanRow(
            request_id=str(i), token_ids=[9], start=2, block_ids=[0], sampling=p, wants_token=True,
            prompt_token_ids=[3], output_token_ids=[8, 9],
        )
        for i, p in enumerate(params)
    ]  # fmt: skip
    masks = TokenMasks(["3"], bytearray(b"\xff" * 16 + b"\x00" * 71), 87)  # the last row may put out ids below 128
    want, got = (Sampler(8, 690, draw).sample(logits, rows, masks) for draw in (None, CudaKernels().sample))
    assert [each.token_id for each in got] == [each.token_id for each in want]
    assert got[0].token_id == 17
    assert got[3].token_id < 128
