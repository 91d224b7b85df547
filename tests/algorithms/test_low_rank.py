from __future__ import annotations

import pytest
import torch

from qwodel.algorithms.low_rank import low_rank
from qwodel.exceptions import ConfigurationError


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_it_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    up, down = low_rank(weight, 5)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(up @ down, left[:, :5] * values[:5] @ right[:5], atol=1e-9)


def test_a_gram_matrix_makes_it_the_best_for_those_inputs() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(500, 24, generator=generator, dtype=torch.float64) * torch.logspace(1, -1, 24)
    weight = torch.randn(40, 24, generator=generator, dtype=torch.float64)

    def error(factors: tuple[torch.Tensor, torch.Tensor]) -> float:
        return float((inputs @ (weight - factors[0] @ factors[1]).T).square().sum())

    best = torch.linalg.svd(inputs @ weight.T)[1][5:].square().sum()
    assert error(low_rank(weight, 5, inputs.T @ inputs)) < 1.02 * float(best)
    assert error(low_rank(weight, 5)) > 1.2 * float(best)


def test_large_matrices_take_a_randomized_svd() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(1600, 8, generator=generator) @ torch.randn(8, 1600, generator=generator)
    state = torch.get_rng_state()
    up, down = low_rank(weight, 8, dtype=torch.float32)
    assert float((weight - up @ down).norm() / weight.norm()) < 1e-4
    assert torch.equal(torch.get_rng_state(), state)


def test_ranks_are_bounded() -> None:
    up, down = low_rank(torch.eye(6), 99)
    assert torch.allclose(up @ down, torch.eye(6, dtype=torch.float64))
    with pytest.raises(ConfigurationError, match="at least 1"):
        low_rank(torch.eye(6), 0)
