"""Update rules of learned rounding: from one rounded iterate to the next proposal.

The loop and its acceptance test are shared (:mod:`qwodel.algorithms.learned_rounding`);
a rule only proposes. Gradient rules move a continuous position between the two grid
neighbours of each weight and round it; the coordinate rule picks codes directly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from qwodel.algorithms.grid import round_to_grid
from qwodel.algorithms.objectives import GramObjective
from qwodel.algorithms.rounding_problem import Iterate, RoundingProblem
from qwodel.exceptions import ConfigurationError, DependencyError, did_you_mean

__all__ = ["RULES", "UpdateRule", "update_rule"]

_DAMPING = 0.1  # of a Gram matrix's mean diagonal
_PATIENCE = 8  # rows gain steadily: what comes after so many slow iterations is below 0.1 dB of outputs


class UpdateRule(ABC):
    """Proposes the next position and codes of one problem."""

    def __init__(self, problem: RoundingProblem) -> None:
        self.problem = problem

    def patience(self, gained: bool) -> int | None:
        """Iterations without a worthwhile gain after which this rule has none left; ``None``: no limit.

        Args:
            gained: there was a worthwhile gain before.
        """
        return None

    @abstractmethod
    def propose(self, best: Iterate, latest: Iterate, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The next position and codes, both fp32 ``[M, N]``.

        Args:
            best: the best iterate so far.
            latest: the last one that was measured.
            lr: the schedule's learning rate.
        """


class SteepestDescent(UpdateRule):
    """``original`` on the projected objective: Q ← Q − lr · U_k U_kᵀ(Ŵ−W)V_k V_kᵀ.

    The projection has unit curvature, so lr = 1 is the exact continuous step.
    """

    def propose(self, best: Iterate, latest: Iterate, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        problem = self.problem
        position = best.position - (best.gradient * lr).div_(problem.scale)
        position = position.clamp_(problem.low, problem.high)
        return position, problem.round(position, best.codes, best.gradient)


class CoordinateDescent(UpdateRule):
    """``original`` on a Gram matrix: one sweep that sets each column to its exact best codes.

    Column j of all rows goes to round(ŵ_j − (E H)_j / H_jj), and the gradient of the rest
    follows in blocks of columns (the quadratic form is that of Frantar & Alistarh, OBC,
    https://arxiv.org/abs/2208.11580). Its steps are exact, so the learning rate has no part
    in it. The matrix is damped by a tenth of its mean diagonal: less fits the calibration
    tokens better and other tokens worse.
    """

    _BLOCK = 64

    def __init__(self, problem: RoundingProblem) -> None:
        super().__init__(problem)
        if not isinstance(problem.objective, GramObjective):
            raise ConfigurationError("coordinate descent needs a Gram matrix")
        gram = problem.objective.gram
        self._damping = float(gram.diagonal().mean()) * _DAMPING
        self._gram = gram.clone()
        self._gram.diagonal().add_(self._damping)
        self._scale = problem.scale.expand(problem.target.shape)

    def patience(self, gained: bool) -> int | None:
        return 1

    def propose(self, best: Iterate, latest: Iterate, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        error = (best.codes - self.problem.target) * self.problem.scale
        gradient = best.gradient + error.mul_(self._damping)
        codes = best.codes.clone()
        columns = codes.shape[1]
        for start in range(0, columns, self._BLOCK):
            block = slice(start, min(start + self._BLOCK, columns))
            change = self._sweep_block(codes, gradient, block)
            if block.stop < columns:
                gradient[:, block.stop :].addmm_(change.T, self._gram[block, block.stop :])
        return codes, codes

    def _sweep_block(self, codes: torch.Tensor, gradient: torch.Tensor, block: slice) -> torch.Tensor:
        """Settle the columns of a block in ``codes``; returns the change of Ŵ, ``[block, M]``."""
        gram = self._gram[block, block].contiguous()
        slope = gradient[:, block].T.contiguous()
        scale = self._scale[:, block].T.contiguous()
        value = codes[:, block].T.contiguous()
        change = torch.empty_like(value)
        for j in range(value.shape[0]):
            wanted = value[j] - slope[j] / (scale[j] * gram[j, j])
            settled = round_to_grid(wanted, self.problem.quant_type)
            change[j] = (settled - value[j]) * scale[j]
            value[j] = settled
            slope[j + 1 :].addr_(gram[j, j + 1 :], change[j])
        codes[:, block] = value.T
        return change


class TorchOptimizer(UpdateRule):
    """A ``torch.optim`` optimizer on the displacement from the weight, in grid steps.

    Codes that change together disturb each other, so a part (a row, with a Gram matrix) that a
    proposal made worse next takes only those changes that promise most, half as far down as before.
    Weight decay, where the optimizer has it, pulls towards the unrounded weight.

    Args:
        problem: the matrix.
        build: makes the optimizer of one parameter.
        own_rate: the optimizer estimates its own rate and follows its own path: of the
            schedule only reductions count. Otherwise it restarts from the best iterate.
    """

    def __init__(
        self, problem: RoundingProblem, build: Callable[[list[torch.Tensor]], Any], *, own_rate: bool = False
    ) -> None:
        super().__init__(problem)
        self._step = (problem.high - problem.low).clamp_(min=problem.quant_type.smallest_step)
        self._unit = self._step * problem.scale
        self._displacement = torch.zeros_like(problem.target, requires_grad=True)
        self._optimizer = build([self._displacement])
        self._own_rate = own_rate
        self._first_lr: float | None = None
        self._reach: torch.Tensor | None = None
        self._row_by_row = isinstance(problem.objective, GramObjective)

    def patience(self, gained: bool) -> int | None:
        return _PATIENCE if gained and self._row_by_row else None

    def propose(self, best: Iterate, latest: Iterate, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        problem, displacement = self.problem, self._displacement
        follows = latest if self._own_rate else best
        origin = best if self._row_by_row else follows
        with torch.no_grad():
            torch.sub(follows.position, problem.target, out=displacement).div_(self._step)
        slope = origin.gradient * self._unit
        # Only ratios of gradients count, and a mean square of 1 keeps epsilon out of them.
        size = float(torch.linalg.vector_norm(slope)) / slope.numel() ** 0.5
        displacement.grad = slope.div_(max(size, 1e-30))
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(lr)
        self._optimizer.step()
        position = torch.addcmul(problem.target, displacement.detach(), self._step)
        position = position.clamp_(problem.low, problem.high)
        threshold = self._threshold(best, latest) if self._row_by_row else None
        return position, problem.round(position, origin.codes, origin.gradient, threshold)

    def _threshold(self, best: Iterate, latest: Iterate) -> torch.Tensor:
        """What share of its greatest saving a change in each part must promise, ``[parts, 1]``."""
        if self._reach is None:
            self._reach = torch.ones_like(best.loss, dtype=torch.float32)[:, None]
        else:
            helped = (latest.loss <= best.loss)[:, None]
            self._reach = torch.where(helped, (self._reach * 1.25).clamp_(max=1.0), self._reach * 0.5)
        return 1 - self._reach

    def _rate(self, lr: float) -> float:
        if not self._own_rate:
            return lr
        self._first_lr = self._first_lr or lr
        return min(1.0, lr / self._first_lr)


def _original(problem: RoundingProblem) -> UpdateRule:
    return (
        CoordinateDescent(problem)
        if isinstance(problem.objective, GramObjective)
        else SteepestDescent(problem)
    )


def _adamw(problem: RoundingProblem) -> UpdateRule:
    return TorchOptimizer(problem, lambda parameters: torch.optim.AdamW(parameters, betas=(0.9, 0.99)))


def _radam(problem: RoundingProblem) -> UpdateRule:
    return TorchOptimizer(problem, lambda parameters: torch.optim.RAdam(parameters, betas=(0.9, 0.99)))


def _prodigy(problem: RoundingProblem) -> UpdateRule:
    build = _prodigy_class()
    return TorchOptimizer(
        problem, lambda parameters: build(parameters, d0=1e-3, split_groups=False), own_rate=True
    )


def _prodigy_class() -> Any:
    try:
        from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree
    except ImportError as error:
        raise DependencyError(
            "the optimizer 'ppsf' needs ProdigyPlus", hint="pip install prodigy-plus-schedule-free"
        ) from error
    return ProdigyPlusScheduleFree


RULES: dict[str, Callable[[RoundingProblem], UpdateRule]] = {
    "original": _original,
    "adamw": _adamw,
    "radam": _radam,
    "ppsf": _prodigy,
}
"""Update rules by name: each builds a rule for one problem."""


def update_rule(name: str) -> Callable[[RoundingProblem], UpdateRule]:
    """The update rule of that name.

    Raises:
        ConfigurationError: there is none (it is also a ValueError).
        DependencyError: its package is not installed.
    """
    if name not in RULES:
        raise ConfigurationError(
            f"no optimizer is called {name!r}; there are {', '.join(RULES)}",
            hint=did_you_mean(str(name), RULES),
        )
    if name == "ppsf":
        _prodigy_class()
    return RULES[name]
