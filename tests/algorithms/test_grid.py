from __future__ import annotations

import pytest
import torch

from qwodel.algorithms.grid import grid_neighbours, grid_step, round_to_grid
from qwodel.algorithms.quant_types import QUANT_TYPES

from .strategies import grid_of

TYPES = pytest.mark.parametrize("quant_type", QUANT_TYPES.values(), ids=str)


def samples(quant_type) -> torch.Tensor:
    grid = grid_of(quant_type)
    ties = (grid[1:] + grid[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, generator=generator, dtype=torch.float64) * quant_type.qmax / 3
    small = torch.randn(4000, generator=generator, dtype=torch.float64) * quant_type.smallest_step * 4
    outside = torch.tensor([quant_type.qmax * 1.5, -1e30, 1e30, 0.0, -0.0], dtype=torch.float64)
    return torch.cat([grid, ties, noise, small, outside]).float()


@TYPES
def test_rounding_finds_the_nearest_grid_point(quant_type):
    x, grid = samples(quant_type), grid_of(quant_type)
    rounded = round_to_grid(x, quant_type).double()
    assert torch.isin(rounded, grid).all()
    nearest = (x.double()[:, None] - grid).abs().amin(dim=1)
    assert torch.equal((rounded - x.double()).abs(), nearest)


@TYPES
def test_rounding_agrees_with_the_cast_on_ties(quant_type):
    x = samples(quant_type).clamp(quant_type.qmin, quant_type.qmax)
    cast = x if quant_type.is_float else x.round()
    assert torch.equal(round_to_grid(x, quant_type), cast.to(quant_type.dtype).float())


@TYPES
def test_neighbours_are_the_grid_points_around(quant_type):
    x, grid = samples(quant_type), grid_of(quant_type)
    inside = x.double().clamp(quant_type.qmin, quant_type.qmax)
    low, high = grid_neighbours(x, quant_type)
    assert torch.equal(low.double(), grid[torch.searchsorted(grid, inside, right=True) - 1])
    assert torch.equal(high.double(), grid[torch.searchsorted(grid, inside)])


@TYPES
def test_inputs_are_left_alone(quant_type):
    x = samples(quant_type)
    copy = x.clone()
    round_to_grid(x, quant_type)
    grid_neighbours(x, quant_type)
    grid_step(x, quant_type)
    assert torch.equal(x, copy)
