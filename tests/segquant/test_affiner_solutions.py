"""Closed forms against brute-force minimisation of what they claim to minimise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwodel.segquant.affiner.blocks import channels_first, pool_blocks, spread_blocks
from qwodel.segquant.affiner.moments import (
    Moments,
    moments,
    share_terms,
    solve_gain,
    solve_mserel,
    solve_ptqd,
)

seeds = st.integers(0, 2**31 - 1)


def _pair(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(shape, generator=generator)
    return real, 0.8 * real + 0.2 + 0.3 * torch.randn(shape, generator=generator)


def _minimise(objective: Callable[[torch.Tensor], torch.Tensor], start: list[float]) -> torch.Tensor:
    """Newton's method on the objective itself, which is quadratic; the second step checks the first."""
    point = torch.tensor(start, dtype=torch.float64)
    for _ in range(2):
        gradient = torch.autograd.functional.jacobian(objective, point)
        hessian = torch.autograd.functional.hessian(objective, point)
        point = point - torch.linalg.solve(hessian, gradient)
    return point


@settings(max_examples=10, deadline=None)
@given(seeds, st.floats(0, 1), st.floats(1e-3, 2), st.floats(1e-3, 2), st.sampled_from([0.0, 0.1, 1.0]))
def test_mserel_minimises_its_objective(seed: int, alpha: float, l1: float, l2: float, floor: float) -> None:
    real, quant = _pair(seed, 3, 1, 4, 4)
    weight = alpha + (1 - alpha) / (real.square() + floor * real.square().mean()).clamp_min(1e-3)
    gain, bias = solve_mserel(moments(real, quant, weight, lambda x: pool_blocks(x, 4)), l1, l2)
    e, q, a = real.double(), quant.double(), weight.double()

    def objective(point: torch.Tensor) -> torch.Tensor:
        fit = (a * (point[0] * q + point[1] - e).square()).mean(dim=(1, 2, 3)).sum()
        return fit + l1 * (point[0] - 1).square() + l2 * point[1].square()

    best = _minimise(objective, [0.0, 0.0])
    assert float(gain) == pytest.approx(float(best[0]), rel=1e-4, abs=1e-5)
    assert float(bias) == pytest.approx(float(best[1]), rel=1e-4, abs=1e-5)


@settings(max_examples=10, deadline=None)
@given(seeds, st.floats(0, 1), st.floats(0.01, 2), st.floats(0.01, 2))
def test_one_pair_has_the_closed_form_of_the_paper(seed: int, alpha: float, l1: float, l2: float) -> None:
    real, quant = (each.double().abs() + 0.1 for each in _pair(seed, 1, 2, 1, 1))
    a = alpha + (1 - alpha) / real.square()
    gain, bias = solve_mserel(moments(real, quant, a, lambda x: x), l1, l2)
    expected = (real - quant) / (1 + l2 * quant.square() / l1 + l2 / a)
    torch.testing.assert_close(bias[None], expected)
    torch.testing.assert_close(gain[None], 1 + l2 * quant * expected / l1)


@settings(max_examples=10, deadline=None)
@given(seeds, st.floats(1e-3, 2))
def test_tac_minimises_its_objective(seed: int, l2: float) -> None:
    real, quant = _pair(seed, 2, 1, 3, 3)
    weight = 0.9 + 0.1 / (real.square() + 0.1)
    mask = quant.abs() >= 0.5 * quant.abs().mean()
    gain = solve_gain(moments(real, quant, weight * mask, lambda x: x.flatten(2).mean(2)), l2)

    def objective(point: torch.Tensor) -> torch.Tensor:
        fit = weight.double() * mask * (point[0] * quant.double() - real.double()).square()
        return fit.mean(dim=(1, 2, 3)).sum() + l2 * (point[0] - 1).square()

    assert float(gain) == pytest.approx(float(_minimise(objective, [0.0])[0]), rel=1e-4)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_ptqd_fits_slope_and_channel_biases(seed: int) -> None:
    real, quant = _pair(seed, 4, 3, 5, 5)
    quant = quant + torch.tensor([0.5, -1.0, 0.0]).view(1, 3, 1, 1)
    gain, bias = solve_ptqd(moments(real, quant, torch.ones_like(real), lambda x: x.flatten(2).mean(2)))

    def objective(point: torch.Tensor) -> torch.Tensor:
        error = quant.double() - (1 + point[0]) * real.double() - point[1:].view(1, 3, 1, 1)
        return error.square().mean()

    k, *biases = _minimise(objective, [0.0, 0.0, 0.0, 0.0]).tolist()
    assert gain.tolist() == pytest.approx([1 / (1 + k)] * 3, rel=1e-4)
    assert bias.tolist() == pytest.approx([-each / (1 + k) for each in biases], rel=1e-4, abs=1e-5)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_the_share_is_the_best_one_on_other_samples(seed: int) -> None:
    def sums(part: int) -> tuple[Moments, torch.Tensor, torch.Tensor]:
        real, quant = _pair(seed + part, 2, 2, 8, 8)
        return moments(real, quant, torch.ones_like(real), lambda x: pool_blocks(x, 4)), real, quant

    (first, _, _), (second, real, quant) = sums(0), sums(1)
    gain, bias = solve_mserel(first, 0.1, 0.1)
    along, square = share_terms(gain, bias, second)

    def error(share: float) -> float:
        spread = [
            spread_blocks(each, (8, 8), smooth=False) for each in (1 + share * (gain - 1), share * bias)
        ]
        return float((spread[0] * quant.double() + spread[1] - real.double()).square().sum())

    best = along / square
    assert error(best) <= min(error(best - 1e-2), error(best + 1e-2))
    blocks = float(second.error(1 + best * (gain - 1), best * bias).sum()) * 16
    assert blocks == pytest.approx(error(best), rel=1e-5)


@pytest.mark.parametrize(("shape", "size", "blocks"), [
    ((2, 3, 16), 8, (2, 3, 2)),
    ((2, 3, 9, 16), 8, (2, 3, 2, 2)),
    ((2, 3, 4, 8, 6), 4, (2, 3, 4, 2, 2)),
])  # fmt: skip
def test_blocks(shape: tuple[int, ...], size: int, blocks: tuple[int, ...]) -> None:
    values = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    pooled = pool_blocks(values, size)
    assert pooled.shape == blocks
    last = values[..., size * ((shape[-1] - 1) // size) :] if len(shape) == 3 else None
    if last is not None:
        torch.testing.assert_close(pooled[..., -1], last.mean(-1))
    spread = spread_blocks(pooled[0], shape[2:], smooth=False)
    assert spread.shape == (1, *shape[1:])
    assert set(spread.unique().tolist()) == set(pooled[0].unique().tolist())
    constant = torch.full_like(pooled[0], 3.0)
    torch.testing.assert_close(
        spread_blocks(constant, shape[2:], smooth=True), torch.full((1, *shape[1:]), 3.0)
    )


def test_edge_blocks_hold_what_is_left() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0]).reshape(1, 1, 5, 1).expand(1, 1, 5, 5)
    assert pool_blocks(values, 4)[0, 0].tolist() == [[2.5, 2.5], [9.0, 9.0]]


def test_tokens_have_channels_last() -> None:
    tokens = torch.randn(2, 5, 3)
    assert channels_first(tokens).shape == (2, 3, 5)
    assert torch.equal(channels_first(channels_first(tokens)), tokens)
