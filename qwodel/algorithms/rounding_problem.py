"""What learned rounding works on: one matrix with its objective, and rounded versions of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwodel.algorithms.grid import grid_neighbours, round_to_grid
from qwodel.algorithms.objectives import Objective
from qwodel.algorithms.quant_types import QuantType

__all__ = ["Iterate", "RoundingProblem"]


class RoundingProblem:
    """What stays fixed while a matrix is rounded.

    Attributes:
        target: fp32 ``[M, N]`` weights divided by their scale.
        scale: fp32 scale broadcastable to ``[M, N]``, in units that keep losses in range.
        low, high: grid neighbours of ``target``.
    """

    def __init__(
        self, target: torch.Tensor, scale: torch.Tensor, quant_type: QuantType, objective: Objective
    ) -> None:
        self.target, self.scale = target, scale
        self.quant_type, self.objective = quant_type, objective
        self.low, self.high = grid_neighbours(target, quant_type)
        self.curvature = objective.curvature()

    def iterate(self, position: torch.Tensor, codes: torch.Tensor, origin: Iterate | None = None) -> Iterate:
        """Measure rounded codes; cheaper, up to the noise of fp32 sums, from a similar iterate."""
        error = (codes - self.target).mul_(self.scale)
        if origin is None:
            loss, gradient = self.objective.evaluate(error)
        else:
            change = (codes - origin.codes).mul_(self.scale)
            loss, gradient = self.objective.follow(error, origin.gradient, change)
        return Iterate(position, codes, gradient, loss)

    def round(
        self,
        position: torch.Tensor,
        current: torch.Tensor,
        gradient: torch.Tensor,
        threshold: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Round a position, leaving out each change of code that by itself raises the loss.

        What a change adds to ‖E‖² counts ``objective.weight_price`` times as much as the loss.
        ``threshold``, ``[parts, 1]``, also leaves out what by itself saves less than this share of
        the greatest saving in its part.
        """
        codes = round_to_grid(position, self.quant_type)
        change = (codes - current).mul_(self.scale)
        rise = (change * self.curvature).add_(gradient, alpha=2.0)
        price = self.objective.weight_price
        if price:
            drift = (codes + current).sub_(self.target, alpha=2.0).mul_(self.scale)  # 2E + change
            rise.add_(drift, alpha=price)
        rise.mul_(change)
        if threshold is None:
            return torch.where(rise < 0, codes, current)
        greatest = rise.reshape(threshold.shape[0], -1).amin(dim=1, keepdim=True)
        return torch.where(rise <= (greatest * threshold).clamp_(max=-1e-30), codes, current)


@dataclass(frozen=True, slots=True)
class Iterate:
    """A rounded matrix and what the objective says about it.

    Attributes:
        position: fp32 ``[M, N]``, the continuous point that was rounded.
        codes: fp32 ``[M, N]`` values on the grid.
        gradient: fp32 ``[M, N]``, ∂f/∂E at the codes.
        loss: fp64 ``[parts]``.
    """

    position: torch.Tensor
    codes: torch.Tensor
    gradient: torch.Tensor
    loss: torch.Tensor

    def keep_better(self, other: Iterate) -> Iterate:
        """Part by part, whichever of the two has the smaller loss; the other where they are equal."""
        better = other.loss <= self.loss
        if bool(better.all()):
            return other
        if not bool(better.any()):
            return self
        rows = better[:, None]
        return Iterate(
            torch.where(rows, other.position, self.position),
            torch.where(rows, other.codes, self.codes),
            torch.where(rows, other.gradient, self.gradient),
            torch.where(better, other.loss, self.loss),
        )
