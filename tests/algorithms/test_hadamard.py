from __future__ import annotations

import comfy_kitchen.backends.eager as comfy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwodel.algorithms.hadamard import (
    Rotation,
    convrot_gram,
    convrot_group_size,
    convrot_matrix,
    convrot_weight,
    orthogonal_factor,
    walsh_hadamard,
)
from qwodel.exceptions import ConfigurationError, ValidationError


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_weights_rotate_as_the_reader_rotates_them(size):
    weight = torch.randn(10, 3 * size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        convrot_weight(weight, size), comfy.rotate_int8_convrot_weight(weight, size), atol=1e-5
    )


@pytest.mark.parametrize("size", [4, 16, 64, 256, 1024])
def test_the_rotation_is_symmetric_and_orthogonal(size):
    matrix = convrot_matrix(size, torch.float64)
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


@pytest.mark.parametrize(
    ("columns", "size"),
    [(576, 64), (1536, 256), (288, 16), (768, 256), (4096, 256), (12, 4), (6, None), (7, None), (0, None)],
)
def test_the_largest_group_that_divides(columns, size):
    assert convrot_group_size(columns) == size


def test_group_sizes_have_a_limit():
    assert convrot_group_size(4096, largest=64) == 64


@pytest.mark.parametrize("size", [0, 2, 8, 32, 128, 512, 100, -4])
def test_sizes_no_reader_takes(size):
    with pytest.raises(ConfigurationError, match="power of 4"):
        convrot_matrix(size)


def test_columns_that_do_not_fall_into_groups():
    with pytest.raises(ValidationError, match="30 columns"):
        convrot_weight(torch.ones(2, 30), 16)


def test_rotated_statistics_are_those_of_rotated_inputs():
    inputs = torch.randn(50, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotated = convrot_weight(inputs, 16)
    assert torch.allclose(convrot_gram(inputs.T @ inputs, 16), rotated.T @ rotated, atol=1e-10)


def test_walsh_hadamard_is_the_kronecker_power():
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.allclose(walsh_hadamard(x), x @ matrix / 8, atol=1e-12)


@pytest.mark.parametrize("length", [3, 12, 0])
def test_walsh_hadamard_wants_a_power_of_two(length):
    with pytest.raises(ValidationError, match="power of two"):
        walsh_hadamard(torch.ones(2, length))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**31))
def test_rotations_of_any_size_keep_lengths_and_can_be_undone(size, seed):
    rotation = Rotation.random(size, seed)
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(3))
    turned = rotation.apply(x)
    assert torch.allclose(turned.norm(dim=1), x.norm(dim=1), rtol=1e-4)
    assert torch.allclose(rotation.inverse(turned), x, atol=1e-4)
    assert torch.equal(turned, Rotation.random(size, seed).apply(x))


@pytest.mark.parametrize("size", [576, 1536, 37, 1024, 96])
def test_rotations_spread_an_outlier(size):
    spike = torch.zeros(size)
    spike[size // 3] = 1
    turned = Rotation.random(size, 0).apply(spike).abs()
    assert float(turned.max()) <= (2 / size) ** 0.5 * 1.001


@pytest.mark.parametrize("size", [1, 3, 7, 43, 255])
def test_the_odd_factor_is_orthogonal_and_even(size):
    factor = orthogonal_factor(size).double()
    assert torch.allclose(factor @ factor.T, torch.eye(size, dtype=torch.float64), atol=1e-5)
    assert float(factor.abs().max()) <= (2 / size) ** 0.5 + 1e-6


def test_seeds_differ():
    assert not torch.equal(Rotation.random(64, 0).signs, Rotation.random(64, 1).signs)
