"""The three affiners: how they weigh, what they sum up, and what they solve."""

from __future__ import annotations

from typing import cast

import torch

from qwodel.segquant.affiner.base import Affiner, Solution
from qwodel.segquant.affiner.blocks import pool_blocks, spread_blocks, whole
from qwodel.segquant.affiner.config import AffinerConfig, BlockwiseSolver, PTQDSolver, TACSolver
from qwodel.segquant.affiner.moments import Moments, moments, solve_gain, solve_mserel, solve_ptqd

__all__ = ["BlockwiseAffiner", "PTQDAffiner", "TACAffiner", "make_affiner"]


class BlockwiseAffiner(Affiner):
    """One gain and bias for each channel and block: ``ε ≈ Kε̂ + b`` (SegQuant, arXiv 2507.14811)."""

    @property
    def solver(self) -> BlockwiseSolver:
        """Its settings, with their own type."""
        return cast("BlockwiseSolver", self._solver)

    def _sums(self, real: torch.Tensor, quant: torch.Tensor) -> Moments:
        size = self.solver.blocksize
        if self.solver.sample_mode == "block":
            weight = _weight(real, self.solver.alpha, 1 - self.solver.alpha, self.solver.floor)
            return moments(real, quant, weight, lambda values: pool_blocks(values, size))
        real, quant = pool_blocks(real, size), pool_blocks(quant, size)
        weight = _weight(real, self.solver.alpha, 1 - self.solver.alpha, self.solver.floor)
        return moments(real, quant, weight, lambda values: values)

    def _solve(self, sums: Moments) -> Solution:
        gain, bias = solve_mserel(sums, self.solver.lambda1, self.solver.lambda2)
        change = (gain - 1).square() * sums.s2 + 2 * (gain - 1) * bias * sums.s1 + bias.square() * sums.s0
        limit = torch.quantile(change.flatten(), self.solver.percentile / 100)
        kept = change >= limit if self.solver.greater else change <= limit
        return torch.where(kept, gain, 1.0), torch.where(kept, bias, 0.0)

    def _spread(self, values: torch.Tensor, spatial: tuple[int, ...]) -> torch.Tensor:
        return spread_blocks(values, spatial, smooth=self.solver.sample_mode == "interpolate")


class PTQDAffiner(Affiner):
    """Correlated error and channel biases taken away: ``ε ≈ (ε̂ − bias_c)/(1+k)`` (arXiv 2305.10657)."""

    @property
    def solver(self) -> PTQDSolver:
        """Its settings, with their own type."""
        return cast("PTQDSolver", self._solver)

    def _sums(self, real: torch.Tensor, quant: torch.Tensor) -> Moments:
        return moments(real, quant, torch.ones_like(real), whole)

    def _solve(self, sums: Moments) -> Solution:
        return solve_ptqd(sums)


class TACAffiner(Affiner):
    """One factor for each channel, where the output is not small: ``ε ≈ Kε̂``.

    K minimises the mean over those elements of ``(1−λ₁)(Kε̂−ε)² + λ₁(Kε̂−ε)²/ε²``, plus ``λ₂(K−1)²``.
    """

    @property
    def solver(self) -> TACSolver:
        """Its settings, with their own type."""
        return cast("TACSolver", self._solver)

    def _sums(self, real: torch.Tensor, quant: torch.Tensor) -> Moments:
        weight = _weight(real, 1 - self.solver.lambda1, self.solver.lambda1, self.solver.floor)
        return moments(real, quant, weight * self._mask(quant), whole)

    def _solve(self, sums: Moments) -> Solution:
        gain = solve_gain(sums, self.solver.lambda2)
        return gain, torch.zeros_like(gain)

    def _mask(self, quant: torch.Tensor) -> torch.Tensor:
        return quant.abs() >= self.solver.threshold * quant.abs().mean()


def make_affiner(config: AffinerConfig) -> Affiner:
    """Return the affiner a configuration asks for, with nothing learned."""
    kinds: dict[str, type[Affiner]] = {"blockwise": BlockwiseAffiner, "ptqd": PTQDAffiner, "tac": TACAffiner}
    return kinds[config.type](config)


def _weight(real: torch.Tensor, absolute: float, relative: float, floor: float) -> torch.Tensor:
    """Return ``absolute + relative/(ε² + floor·mean ε²)``, the mean being each channel's."""
    square = real.square()
    mean = square.mean(dim=[0, *range(2, real.ndim)], keepdim=True)
    return absolute + relative / (square + floor * mean).clamp_min(1e-12)
