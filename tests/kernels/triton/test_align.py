import pytest
import torch

pytest.importorskip("triton")

from ernie_serve.kernels.triton import align as kernel
from ernie_serve.kernels.triton.align import align, sort

pytestmark = pytest.mark.usefixtures("poison")


def plain(ids: torch.Tensor, E: int, S: int) -> list[list[int]]:
    """The pairs of each expert, those of the shared parts and of none last, each in order."""
    T, A = ids.shape
    pairs: list[list[int]] = [[] for _ in range(E + S + 1)]
    for t in range(T):
        for slot in range(A + S):
            expert = E + slot - A if slot >= A else int(ids[t, slot])
            pairs[expert if expert >= 0 else E + S].append(t * (A + S) + slot)
    return pairs


@pytest.fixture(params=["once", "some at a time"])
def pieces(request, monkeypatch):
    """Pairs read once, or 16 at a time, as of a prompt that has too many."""
    if request.param != "once":
        monkeypatch.setattr(kernel, "_A_PIECE", 16)
        monkeypatch.setattr(kernel, "_IN_ONE_PIECE", 1)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("T", "A", "E", "S", "rows"), [(1, 2, 4, 0, 16), (20, 3, 8, 2, 4), (70, 2, 5, 1, 16)])
def test_every_pair_is_in_one_block_of_its_expert(generator, T, A, E, S, rows):
    ids = torch.rand(T, E, generator=generator).topk(A).indices.int()
    ids[T // 2] = -1
    order, block_experts = align(ids, E, S, rows)
    blocks = order.view(-1, rows).tolist()
    found: list[list[int]] = [[] for _ in range(E + S + 1)]
    for expert, block in zip(block_experts.tolist(), blocks, strict=True):
        if expert < 0:
            continue
        assert block[0] >= 0, "a block has an expert because it has a row"
        real = [pair for pair in block if pair >= 0]
        assert block == real + [-1] * (rows - len(real)), "a block is filled from its beginning"
        found[expert] += real
    assert found == plain(ids, E, S)
    assert block_experts[block_experts >= 0].tolist() == sorted(block_experts[block_experts >= 0].tolist())


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("T", "A", "E"), [(1, 2, 4), (20, 3, 8), (70, 2, 5)])
def test_sorted_tokens_stand_by_expert_and_each_pair_knows_its_place(generator, T, A, E):
    ids = torch.rand(T, E, generator=generator).topk(A).indices.int()
    ids[T // 2] = -1
    ids[0, 0] = -1
    tokens, places, ends = sort(ids, E)
    want = plain(ids, E, 0)
    assert tokens.tolist() == [pair // A for pairs in want for pair in pairs]
    assert ends.tolist() == torch.tensor([len(pairs) for pairs in want[:E]]).cumsum(0).tolist()
    routed = [pair for pairs in want[:E] for pair in pairs]
    assert places.flatten().tolist() == [routed.index(i) if i in routed else -1 for i in range(T * A)]
