"""A place is the part of a parameter that a stored tensor fills."""

import torch

from ernie_serve.model.placing import Place


def test_a_place_in_a_fused_matrix_is_some_of_its_rows() -> None:
    parameter = torch.arange(12).view(4, 3)
    assert Place("x", (2, 3), first_row=1, num_rows=2).view(parameter).tolist() == [[3, 4, 5], [6, 7, 8]]


def test_a_transposed_place_has_the_shape_of_the_stored_tensor() -> None:
    parameter = torch.arange(12).view(4, 3)
    assert Place("x", (3, 2), 2, 2, transposed=True).view(parameter).tolist() == [[6, 9], [7, 10], [8, 11]]


def test_a_place_in_stacked_experts_is_in_one_of_them() -> None:
    parameter = torch.arange(24).view(2, 4, 3)
    assert Place("x", (1, 3), 3, 1, expert=1).view(parameter).tolist() == [[21, 22, 23]]


def test_a_bias_is_stored_with_one_dimension_more() -> None:
    parameter = torch.zeros(3)
    Place("x", (1, 3), 0, 3).view(parameter).copy_(torch.tensor([[1, 2, 3]]))
    assert parameter.tolist() == [1, 2, 3]
