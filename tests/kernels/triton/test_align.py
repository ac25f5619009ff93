import pytest
import torch

pytest.importorskip("triton")

from ernie_serve.kernels.triton.align import align, align_many

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


@pytest.mark.parametrize("how", [align, align_many])
@pytest.mark.parametrize(("T", "A", "E", "S", "rows"), [(1, 2, 4, 0, 16), (20, 3, 8, 2, 4), (70, 2, 5, 1, 16)])
def test_every_pair_is_in_one_block_of_its_expert(generator, how, T, A, E, S, rows):
    ids = torch.rand(T, E, generator=generator).topk(A).indices.int()
    ids[T // 2] = -1
    order, block_experts = how(ids, E, S, rows)
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
