"""Masks say of each row which scores are left."""

import math
import random

import pytest
import torch

from ernie_serve.messages import TokenMasks
from ernie_serve.worker.bounds import Bounds

BYTES = 40
V = 8 * BYTES - 25  # the mask goes on behind the vocabulary

PLACES = {"a": 0, "b": 1, "c": 2, "d": 3}


@pytest.fixture
def bits():
    return bytearray(random.Random(1).randbytes(2 * BYTES))


@pytest.fixture
def bounds(bits):
    return Bounds(TokenMasks(["d", "b"], bits, BYTES), PLACES, V)


def allowed(bits, place):
    return [bool(bits[place * BYTES + i // 8] >> i % 8 & 1) for i in range(V)]


def test_every_bit_decides_its_token(bits, bounds):
    assert [bounds.allows(3, i) for i in range(V)] == allowed(bits, 0)
    assert [bounds.allows(1, i) for i in range(V)] == allowed(bits, 1)
    assert all(bounds.allows(0, i) for i in range(V))
    assert [row in bounds for row in range(4)] == [False, True, False, True]


def test_what_is_forbidden_is_taken_from_the_named_rows_and_from_no_other(bits, bounds):
    scores = torch.randn(4, V)
    expected = scores.clone()
    for row, place in ((3, 0), (1, 1)):
        expected[row, ~torch.tensor(allowed(bits, place))] = -math.inf
    before = scores.clone()
    assert torch.equal(bounds.applied(scores[[1, 3]], [1, 3]), expected[[1, 3]])
    assert torch.equal(bounds.applied_to_all(scores), expected)
    assert torch.equal(scores, before)
