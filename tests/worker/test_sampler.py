"""The sampler against the definitions written out one token at a time."""

import math
import random
from collections import Counter
from itertools import pairwise

import pytest
import torch

from ernie_serve.messages import NO_TOKEN, PlanRow, SamplingParams, TokenMasks
from ernie_serve.worker.sampler import Sampler, uniform

V = 60


def logits_for(rows, seed=0, num_ids=V):
    return 3 * torch.randn(rows, num_ids, generator=torch.Generator().manual_seed(seed))


def row(name="a", prompt=(1, 2, 3), output=(), **sampling):
    return PlanRow(
        request_id=name,
        token_ids=[0],
        start=0,
        block_ids=[0],
        sampling=SamplingParams(**{"max_tokens": 99, "seed": 0} | sampling),
        wants_token=True,
        prompt_token_ids=list(prompt),
        output_token_ids=list(output),
    )


def obvious(logits, one):
    """The chosen id by the definitions: plain floats, a full sort, a loop."""
    p, counts = one.sampling, Counter(one.output_token_ids)
    x = [float(v) for v in logits]
    for i, bias in p.logit_bias.items():
        x[i] += bias
    if len(one.output_token_ids) < p.min_tokens:
        for i in p.stop_token_ids:
            x[i] = -math.inf
    for i in set(one.prompt_token_ids) | set(one.output_token_ids):
        x[i] = x[i] / p.repetition_penalty if x[i] > 0 else x[i] * p.repetition_penalty
    for i, count in counts.items():
        x[i] -= p.frequency_penalty * count + p.presence_penalty
    if p.temperature == 0:
        return x.index(max(x))
    weights = [math.exp((v - max(x)) / p.temperature) for v in x]
    weights = [w if w >= p.min_p else 0.0 for w in weights]
    likeliest = sorted(range(len(x)), key=lambda i: (-x[i], i))
    kept = likeliest[: p.top_k or None]
    mass = sum(weights[i] for i in kept)
    nucleus, covered = [], 0.0
    for i in kept:
        if nucleus and covered >= p.top_p * mass and p.top_p < 1:
            break
        nucleus.append(i)
        covered += weights[i]
    inside = set(nucleus)
    weights = [w if i in inside else 0.0 for i, w in enumerate(weights)]
    target, total = uniform(p.seed, len(one.output_token_ids)) * sum(weights), 0.0
    for i, w in enumerate(weights):
        total += w
        if total > target:
            return i
    raise AssertionError("the distribution sums to what it sums to")


VARIETIES = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"temperature": 1e-9},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 500},
    {"top_p": 0.0},
    {"top_p": 1e-6},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.01, "temperature": 1.5},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5, "temperature": 0},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.7, "temperature": 0},
    {"repetition_penalty": 1.2, "presence_penalty": -0.4, "frequency_penalty": 1.1},
    {"logit_bias": {4: 5.0, 9: -100.0}},
    {"logit_bias": {11: 100.0}, "temperature": 0},
    {"min_tokens": 5, "stop_token_ids": (3, 7), "logit_bias": {3: 50.0}},
]


@pytest.mark.parametrize("sampling", VARIETIES, ids=str)
def test_each_parameter_alone_does_what_its_definition_says(sampling):
    for seed in range(40):
        one = row(output=[5, 6, 5, 9][: seed % 5], seed=seed, **sampling)
        logits = logits_for(1, seed)
        [sampled] = Sampler(8).sample(logits, [one])
        assert sampled.token_id == obvious(logits[0], one)


def test_a_batch_of_all_kinds_yields_what_each_row_yields_alone():
    chance = random.Random(0)
    for seed in range(15):
        rows = [
            row(str(i), output=[chance.randrange(V) for _ in range(i % 4)], seed=chance.randrange(1 << 63), **sampling)
            for i, sampling in enumerate(chance.sample(VARIETIES * 3, 50))
        ]
        logits = logits_for(len(rows), seed)
        before = logits.clone()
        sampled = Sampler(99).sample(logits, rows)
        assert [s.token_id for s in sampled] == [obvious(x, one) for x, one in zip(logits, rows, strict=True)]
        assert torch.equal(logits, before)


def test_a_wide_nucleus_over_a_large_vocabulary_is_exact():
    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(1))
    kinds = [{"top_p": 0.97}, {"top_p": 0.05}, {"top_k": 1100}, {"top_k": 900, "top_p": 0.9}]
    for seed in range(4):
        rows = [row(str(i), seed=seed, **kind) for i, kind in enumerate(kinds)]
        sampled = Sampler(8).sample(logits, rows)
        assert [s.token_id for s in sampled] == [obvious(x, one) for x, one in zip(logits, rows, strict=True)]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9}])
def test_of_equal_scores_the_lowest_id_wins(sampling):
    logits = torch.zeros(1, V)
    logits[0, [9, 30, 41]] = 4.0
    for seed in range(20):
        assert Sampler(4).sample(logits, [row(seed=seed, **sampling)])[0].token_id == 9


def test_ties_at_the_edge_of_top_k_keep_exactly_k():
    logits = torch.zeros(1, V)
    logits[0, 50] = 2.0
    seen = {Sampler(4).sample(logits, [row(seed=seed, top_k=3)])[0].token_id for seed in range(200)}
    assert seen == {0, 1, 50}


def test_chance_depends_on_the_seed_and_the_number_of_tokens_only():
    logits = logits_for(3)
    sampler = Sampler(4)
    alone = sampler.sample(logits[:1], [row("a", seed=11, output=[1, 2])])[0].token_id
    others = [row("b", seed=5), row("c", temperature=0)]
    assert sampler.sample(logits, [row("z", seed=11, output=[8, 9]), *others])[0].token_id == alone
    assert uniform(11, 2) == uniform(11, 2) != uniform(11, 3) != uniform(12, 3)


def test_uniforms_are_spread_evenly_over_seeds_and_over_tokens():
    for numbers in ([uniform(seed, 0) for seed in range(20000)], [uniform(77, n) for n in range(20000)]):
        assert min(numbers) >= 0
        assert max(numbers) < 1
        tenths = Counter(int(10 * u) for u in numbers)
        assert all(abs(tenths[i] - 2000) < 200 for i in range(10))  # 4.7 standard deviations, of fixed numbers
        pairs = Counter((int(4 * a), int(4 * b)) for a, b in pairwise(numbers))
        assert all(abs(pairs[i, j] - 1250) < 170 for i in range(4) for j in range(4))


@pytest.mark.parametrize("kind", [{}, {"top_p": 0.999}, {"top_k": 9}])
def test_what_is_next_to_impossible_is_impossible_at_every_point(monkeypatch, kind):
    import ernie_serve.worker.sampler as module

    logits = torch.full((1, V), -90.0)
    logits[0, [20, 30]] = 0.0
    for point, expected in ((0.0, 20), (0.5 - 2.0**-53, 20), (0.5, 30), (1 - 2.0**-53, 30)):
        monkeypatch.setattr(module, "uniform", lambda seed, count, point=point: point)
        assert Sampler(4).sample(logits, [row(**kind)])[0].token_id == expected


@pytest.mark.parametrize("seed", [-1, -(1 << 63), (1 << 64) - 1, 0])
def test_every_seed_an_integer_can_be_is_a_seed(seed):
    assert 0 <= uniform(seed, 0) < 1


def test_the_ends_of_the_distribution_are_reachable_and_nothing_beyond(monkeypatch):
    import ernie_serve.worker.sampler as module

    logits = logits_for(1)
    logits[0, [0, 1, V - 2, V - 1]] = -math.inf
    for point, expected in ((0.0, 2), (1 - 2.0**-53, V - 3)):
        monkeypatch.setattr(module, "uniform", lambda seed, count, point=point: point)
        assert Sampler(4).sample(logits, [row()])[0].token_id == expected


def test_min_tokens_lets_stop_ids_through_once_there_are_enough():
    logits = torch.zeros(1, V)
    logits[0, 7] = 50.0
    ids = [
        Sampler(4).sample(logits, [row(output=[1] * n, min_tokens=2, stop_token_ids=(7,))])[0].token_id == 7
        for n in range(4)
    ]
    assert ids == [False, False, True, True]


def test_penalties_count_each_new_token_once_over_many_steps():
    sampler, kind = Sampler(2), {"frequency_penalty": 0.5, "repetition_penalty": 1.1, "temperature": 0.8}
    output = []
    for step in range(90):  # more distinct tokens than a history starts with room for
        logits = logits_for(1, step, 200)
        one = row(prompt=range(10), output=output, seed=step, **kind)
        [sampled] = sampler.sample(logits, [one])
        assert sampled.token_id == obvious(logits[0], one)
        output.append(sampled.token_id)


def test_a_forgotten_history_is_rebuilt():
    sampler, kind = Sampler(1), {"frequency_penalty": 2.0, "temperature": 0}
    logits = logits_for(1)
    for output in ([], [4], [4, 4], [4, 4, 9]):
        for name in ("a", "b"):  # each pushes the other out
            one = row(name, output=output, **kind)
            assert sampler.sample(logits, [one])[0].token_id == obvious(logits[0], one)


def test_logprobs_are_the_models_own_before_any_parameter():
    logits = logits_for(3)
    rows = [
        row("a", logprobs=3, temperature=0.2, top_k=2, logit_bias={8: 40.0}),
        row("b"),
        row("c", logprobs=0, temperature=0, presence_penalty=1.0),
    ]
    a, b, c = Sampler(4).sample(logits, rows)
    logs = logits.log_softmax(-1)
    assert (a.token_id, a.logprobs.token_id) == (8, 8)
    assert a.logprobs.logprob == pytest.approx(logs[0, 8].item())
    best = logs[0].sort(descending=True)
    assert [i for i, _ in a.logprobs.top] == best.indices[:3].tolist()
    assert [v for _, v in a.logprobs.top] == pytest.approx(best.values[:3].tolist())
    assert b.logprobs is None
    assert c.logprobs.top == []
    assert c.logprobs.logprob == pytest.approx(logs[2, c.token_id].item())


def test_padding_ids_of_the_vocabulary_are_never_chosen_nor_listed():
    logits = torch.zeros(2, V)
    logits[:, 50:] = 30.0
    rows = [row("a", temperature=0, logprobs=5, logit_bias={55: 100.0}), row("b", prompt=[58], repetition_penalty=2.0)]
    for seed in range(20):
        rows[1] = row("b", prompt=[58], seed=seed, repetition_penalty=2.0)
        a, b = Sampler(4, num_valid_ids=50).sample(logits, rows)
        assert max(a.token_id, b.token_id, *(i for i, _ in a.logprobs.top)) < 50


def test_padding_ids_of_the_vocabulary_have_their_share_in_logprobs():
    logits = logits_for(2)
    sampled = Sampler(4, num_valid_ids=50).sample(
        logits, [row(name, seed=n, logprobs=3) for n, name in enumerate("ab")]
    )
    logs = logits.log_softmax(-1)
    for one, line in zip(sampled, logs, strict=True):
        assert one.logprobs.logprob == pytest.approx(line[one.token_id].item())
        assert [i for i, _ in one.logprobs.top] == line[:50].topk(3).indices.tolist()
        assert [v for _, v in one.logprobs.top] == pytest.approx(line[:50].topk(3).values.tolist())


def test_bfloat16_logits_are_read_in_float32():
    logits = logits_for(2).bfloat16()
    rows = [row("a", seed=3, top_p=0.9), row("b", temperature=0, logprobs=2)]
    assert [s.token_id for s in Sampler(4).sample(logits, rows)] == [
        obvious(x, one) for x, one in zip(logits.float(), rows, strict=True)
    ]


def masks_of(allowed):
    """Masks of rows by name; ids beyond the vocabulary are padding of the mask."""
    size, bits = 12, bytearray()
    for ids in allowed.values():
        row = bytearray(size)
        for i in ids:
            row[i // 8] |= 1 << i % 8
        bits += row
    return TokenMasks(list(allowed), bits, size)


@pytest.mark.parametrize("sampling", VARIETIES, ids=str)
def test_a_masked_row_yields_what_it_would_if_there_were_no_other_ids(sampling):
    chance = random.Random(3)
    for seed in range(20):
        allowed = sorted(chance.sample(range(V), chance.choice([1, 2, 20, V - 1])))
        one = row(output=[5, 6, 5, 9][: seed % 5], seed=seed, **{**sampling, "stop_token_ids": (), "min_tokens": 0})
        logits = logits_for(1, seed)
        bare = logits.clone()
        bare[0, [i for i in range(V) if i not in allowed]] = -math.inf
        [sampled] = Sampler(8).sample(logits, [one], masks_of({"a": allowed}))
        assert sampled.token_id in allowed
        assert sampled.token_id == Sampler(8).sample(bare, [one])[0].token_id


def test_masks_bind_their_own_rows_only_in_any_order():
    logits = logits_for(5)
    before = logits.clone()
    rows = [row(name, seed=n, temperature=n % 2, logprobs=2) for n, name in enumerate("abcde")]
    free = Sampler(9).sample(logits, rows)
    bound = Sampler(9).sample(logits, rows, masks_of({"d": [7], "b": [50, 51]}))
    assert [bound[i] for i in (0, 2, 4)] == [free[i] for i in (0, 2, 4)]
    assert bound[3].token_id == 7
    assert bound[1].token_id in (50, 51)
    assert bound[3].logprobs.logprob == pytest.approx(logits[3].log_softmax(-1)[7].item())
    assert torch.equal(logits, before)


def test_a_mask_outweighs_a_score_that_nothing_can_outweigh():
    logits = logits_for(1)
    logits[0, 9] = math.inf
    assert Sampler(4).sample(logits, [row(temperature=0)], masks_of({"a": [30, 31]}))[0].token_id in (30, 31)


def test_a_mask_that_lets_a_text_end_early_is_followed():
    one = row(output=[], min_tokens=5, stop_token_ids=(7,), temperature=0)
    assert Sampler(4).sample(logits_for(1), [one], masks_of({"a": [7]}))[0].token_id == 7


def test_padding_ids_stay_out_with_a_mask():
    logits = torch.zeros(1, V)
    logits[:, 50:] = 30.0
    sampled = Sampler(4, num_valid_ids=50).sample(logits, [row(temperature=0)], masks_of({"a": [3, 4]}))
    assert sampled[0].token_id == 3


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {}, {"temperature": 0.5, "top_p": 0.9}, {"logprobs": 2}])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("which", [slice(None), 7])
def test_a_row_whose_logits_are_no_numbers_yields_no_token(sampling, wrong, masked, which):
    logits = logits_for(3)
    logits[1, which] = wrong
    masks = TokenMasks([name for name in "abc" if masked], bytearray(b"\xff\xff\xff\xff\xff\xff\xff\x0f" * 3), 8)
    rows = [row(name, **sampling) for name in "abc"]
    seen = [each.token_id for each in Sampler(8).sample(logits, rows, masks if masked else None)]
    assert seen[1] == NO_TOKEN
    assert [seen[0], seen[2]] == [obvious(logits[i], rows[i]) for i in (0, 2)]


def test_a_device_tells_of_logits_that_are_no_numbers_where_logprobs_are_wanted():
    def draw(scores, settings, top_ks, num_ids):
        return torch.full((len(scores),), num_ids - 1)

    logits = logits_for(3)
    logits[1:] = math.nan
    rows = [row("a", logprobs=0), row("b", logprobs=0), row("c")]
    seen = [each.token_id for each in Sampler(8, draw=draw).sample(logits, rows)]
    assert seen == [V - 1, NO_TOKEN, V - 1]
