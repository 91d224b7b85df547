"""Learned rounding: choose between neighbouring codes by what the whole matrix gets wrong.

Rounding is inside the loop: every proposal is rounded, the objective is evaluated on the
rounded codes, and only a proposal that lowers it is kept, so the result is never worse
than the round-to-nearest start. It runs on one thread, for the same bits everywhere. The idea of learning roundings is AdaRound's
(https://arxiv.org/abs/2004.10568).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qwodel.algorithms.determinism import one_thread
from qwodel.algorithms.objectives import (
    ChannelObjective,
    GramObjective,
    Objective,
    ProjectedObjective,
    top_singular_vectors,
)
from qwodel.algorithms.optimizers import update_rule
from qwodel.algorithms.quant_types import Granularity, QuantType
from qwodel.algorithms.rounding_problem import Iterate, RoundingProblem
from qwodel.algorithms.scale_choice import check_channel_weights, check_gram, normalise
from qwodel.algorithms.scales import Quantized, quantize_matrix
from qwodel.algorithms.schedules import Schedule, ScheduleOptions
from qwodel.algorithms.tiles import expand_scale
from qwodel.exceptions import ConfigurationError

__all__ = ["DEFAULT_SEED", "LearnedRounding", "RoundingOptions", "learn_rounding"]

DEFAULT_SEED = 42
"""Seed of everything random in qwodel's algorithms."""

_WORTH = 0.03  # an improvement smaller than this does not end a stall


@dataclass(frozen=True, slots=True)
class RoundingOptions:
    """Everything about the loop but the matrix.

    Attributes:
        optimizer: ``original``, ``adamw``, ``radam`` or ``ppsf``.
        num_iter: the most iterations; 0 rounds to nearest.
        top_p, min_k, max_k, full_matrix: how many singular vectors the projected objective
            looks at, and whether they come from a full SVD.
        weight_price: how much projected loss² a change of code must save for each unit of
            ‖Ŵ−W‖² it adds; 0 looks at the projected loss alone. Unused with a Gram matrix.
        schedule: the learning rate.
        early_stop_loss: stop when the loss is below this share of round-to-nearest's.
        early_stop_lr: stop when the learning rate is below.
        early_stop_stall: stop after so many iterations without a gain of 3 %. Under a Gram matrix
            8 are enough once there was one, and ``original`` stops at the first sweep without.
        seed: of the randomized SVD.
    """

    optimizer: str = "original"
    num_iter: int = 500
    top_p: float = 0.01
    min_k: int = 1
    max_k: int = 16
    full_matrix: bool = False
    weight_price: float = 0.5
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    early_stop_loss: float = 0.03
    early_stop_lr: float = 1e-8
    early_stop_stall: int = 20
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        update_rule(self.optimizer)
        if self.num_iter < 0:
            raise ConfigurationError(f"num_iter cannot be negative: {self.num_iter}")
        if self.early_stop_stall < 1:
            raise ConfigurationError(
                f"early_stop_stall counts iterations, so it is at least 1: {self.early_stop_stall}"
            )
        if self.weight_price < 0:
            raise ConfigurationError(f"weight_price cannot be negative: {self.weight_price}")
        if self.early_stop_loss < 0 or self.early_stop_lr < 0:
            raise ConfigurationError("early_stop_loss and early_stop_lr cannot be negative")
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"top_p is a share of singular values in (0, 1], not {self.top_p}")
        if not 1 <= self.min_k <= self.max_k:
            raise ConfigurationError(f"1 ≤ min_k ≤ max_k is needed, not {self.min_k} and {self.max_k}")


@dataclass(frozen=True, slots=True)
class LearnedRounding:
    """A learned rounding and how it went.

    Attributes:
        quantized: the best rounded iterate.
        loss: its objective, in units of the weight (of the output, up to the Gram matrix's
            own scale, where one was given).
        nearest_loss: the objective of round-to-nearest with the same scale; ``loss`` is not above it.
        changed: share of codes that differ from round-to-nearest.
        iterations: proposals that were tried.
    """

    quantized: Quantized
    loss: float
    nearest_loss: float
    changed: float
    iterations: int


def learn_rounding(
    weight: torch.Tensor,
    quant_type: QuantType,
    granularity: Granularity,
    options: RoundingOptions | None = None,
    *,
    scale: torch.Tensor | None = None,
    gram: torch.Tensor | None = None,
    channel_weights: torch.Tensor | None = None,
) -> LearnedRounding:
    """Round a matrix so that its error is small where it counts.

    Without ``gram`` the objective is the projected weight error ‖U_kᵀ(Ŵ−W)V_k‖_F and each
    code stays one of its weight's two neighbours. With it, the objective is the output error
    √tr((Ŵ−W) H (Ŵ−W)ᵀ), kept row by row. With ``channel_weights`` it is √Σ_j d_j ‖E_j‖², which
    rounding to nearest minimises exactly, so nothing is iterated.

    Args:
        weight: ``[M, N]``, bf16, fp16, fp32 or fp64.
        options: the loop's settings.
        scale: dequant scale to round with; without one, absmax.
        gram: ``[N, N]`` XᵀX of the layer's real inputs; only its direction counts, not its size.
        channel_weights: ``[N]`` mean squared inputs, likewise; not together with ``gram``.

    Raises:
        ValidationError: as :func:`qwodel.algorithms.scales.quantize_matrix`, or statistics that do not fit.
        ConfigurationError: a setting has a bad value.
        DependencyError: ``ppsf`` without its package.
    """
    options = options or RoundingOptions()
    nearest = quantize_matrix(weight, quant_type, granularity, scale)
    statistics = _statistics_objective(weight.shape[1], gram, channel_weights)
    unit = float(nearest.scale.max()) if nearest.scale.numel() else 1.0
    if weight.numel() == 0:
        return LearnedRounding(nearest, 0.0, 0.0, 0.0, 0)
    start_codes = nearest.codes.float()
    with one_thread():
        problem = _problem(weight, nearest, unit, options, statistics)
        start = problem.iterate(problem.target.clamp(problem.low, problem.high), start_codes)
        best, iterations = _loop(problem, start, options)
        if iterations:
            best = start.keep_better(problem.iterate(best.position, best.codes))
    quantized = Quantized(best.codes.to(quant_type.dtype), nearest.scale, quant_type, granularity)
    changed = float((best.codes != start_codes).sum()) / weight.numel()
    return LearnedRounding(quantized, _total(best) * unit, _total(start) * unit, changed, iterations)


def _statistics_objective(
    columns: int, gram: torch.Tensor | None, channel_weights: torch.Tensor | None
) -> Objective | None:
    if gram is not None and channel_weights is not None:
        raise ConfigurationError(
            "give either gram or channel_weights: a Gram matrix already holds the weights"
        )
    if gram is not None:
        return GramObjective(check_gram(gram, columns))
    if channel_weights is not None:
        return ChannelObjective(check_channel_weights(channel_weights, columns))
    return None


def _problem(
    weight: torch.Tensor,
    nearest: Quantized,
    unit: float,
    options: RoundingOptions,
    statistics: Objective | None,
) -> RoundingProblem:
    every_row = slice(0, weight.shape[0])
    target = normalise(weight, nearest.scale, nearest.granularity, every_row)
    scale = expand_scale(nearest.scale / unit, nearest.granularity, every_row, weight.shape[1])
    if statistics is None:
        left, right = top_singular_vectors(
            target * scale,
            top_p=options.top_p,
            min_k=options.min_k,
            max_k=options.max_k,
            full_matrix=options.full_matrix,
            generator=torch.Generator().manual_seed(options.seed),
        )
        statistics = ProjectedObjective(left, right, options.weight_price)
    return RoundingProblem(target, scale, nearest.quant_type, statistics)


def _loop(problem: RoundingProblem, start: Iterate, options: RoundingOptions) -> tuple[Iterate, int]:
    """Propose, round, evaluate, keep the better; until nothing more is to be had."""
    if isinstance(problem.objective, ChannelObjective) or not options.num_iter:
        return start, 0
    rule = update_rule(options.optimizer)(problem)
    schedule = Schedule(options.schedule, tuple(problem.target.shape))
    best, latest, milestone, stall = start, start, _total(start), 0
    floor = options.early_stop_loss * _total(start)
    for iteration in range(options.num_iter):
        own = rule.patience(gained=milestone < _total(start))
        patience = min(options.early_stop_stall, own or options.early_stop_stall)
        if _total(best) <= floor or schedule.lr < options.early_stop_lr or stall >= patience:
            return best, iteration
        position, codes = rule.propose(best, latest, schedule.lr)
        before = best
        latest = problem.iterate(position, codes, best)
        best = best.keep_better(latest)
        # A step that moves no code was too short, which is no reason to shorten the next one.
        schedule.update(improved=_total(best) < _total(before) or torch.equal(codes, before.codes))
        stall += 1
        if _total(best) < milestone * (1 - _WORTH):
            milestone, stall = _total(best), 0
    return best, options.num_iter


def _total(iterate: Iterate) -> float:
    return float(iterate.loss.square().sum().sqrt())
