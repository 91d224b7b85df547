"""One linear layer: what divides its inputs, what its codes are, judged by the error of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from qwodel.algorithms.smoothing import smoothing_scales
from qwodel.modeling.observe.rows import LayerInputs, thinned
from qwodel.modules.segment_linear import SegmentProduct
from qwodel.segquant.input_scales import SEARCH_ROWS, input_rounding
from qwodel.segquant.rounding import round_segments
from qwodel.segquant.seams import WeightCut
from qwodel.segquant.settings import Calibrate, LayerSettings, Optimum, Polarity
from qwodel.segquant.smoothed_weight import Factors, SmoothedWeight, low_rank_branch

__all__ = ["LayerProblem", "SolvedLayer", "shared_smoothing", "solve"]

_LEAST_SCALE, _MOST_SCALE = 1e-4, 1e4
_ASYMMETRY = 0.5
"""One side's reach as a share of the other's, up to which two scales are worth trying."""
_SPLIT_GAIN = 0.9
"""What the error must fall to before each output segment gets a smoothing, and a product, of its own."""
_PRODUCTS_PRICE = 1.05


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """A weight ``[M, N]`` and what it meets.

    Attributes:
        cut: segments of outputs and inputs.
        activated: an activation function feeds the layer.
        smoothing: what inputs are divided by and the α it came from, where that is settled already.
        dtype: of the layer; a low-rank branch is stored in bf16 where it is that, else in fp16.
    """

    weight: torch.Tensor
    inputs: LayerInputs
    settings: LayerSettings
    cut: WeightCut
    activated: bool = False
    smoothing: tuple[float | None, torch.Tensor | None] | None = None
    dtype: torch.dtype = torch.float32

    def rows(self, part: slice, height: int) -> LayerProblem:
        """The problem of some of the outputs."""
        return replace(self, weight=self.weight[part], cut=WeightCut((height,), self.cut.inputs))


@dataclass(eq=False)
class SolvedLayer:
    """A solved layer.

    Attributes:
        parts: products of consecutive outputs.
        error: ‖ŷ − y‖² of held-out rows, of the signal's.
        how: what was chosen, for people.
        tried: plan → error, of all that was tried.
    """

    parts: list[SegmentProduct]
    error: float
    how: str
    tried: dict[str, float] = field(default_factory=dict)


def shared_smoothing(problem: LayerProblem) -> tuple[float | None, torch.Tensor | None]:
    """The smoothing of least error for layers that read the same, their weights stacked in one problem."""
    search = _Search(problem)
    plan = search.settle().plan
    return plan.alpha, search.smoothing(plan.alpha)


def solve(problem: LayerProblem) -> SolvedLayer:
    """The best product of a problem under its settings."""
    search = _Search(problem)
    whole = search.settle()
    alone = problem.settings.opt.type is Optimum.DEFAULT or problem.smoothing is not None
    if alone or len(problem.cut.outputs) == 1:
        return search.refine(whole)
    start, single = 0, []
    for height in problem.cut.outputs:
        single.append(_Search(problem.rows(slice(start, start + height), height)))
        start += height
    settled = [each.settle() for each in single]
    if _together(single, [each.error for each in settled]) >= whole.error * _SPLIT_GAIN:
        return search.refine(whole)
    choices = [each.refine(made) for each, made in zip(single, settled, strict=True)]
    parts = [part for each in choices for part in each.parts]
    how = f"{len(parts)} parts: {'; '.join(each.how for each in choices)}"
    return SolvedLayer(parts, _together(single, [each.error for each in choices]), how)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a product is made of, but for its numbers.

    Attributes:
        alpha: of the smoothing; ``None`` leaves inputs as they are.
        sizes: columns with input scales of their own.
        polarity: one input scale, two, or a zero point.
        clip: input scales that may clip.
        fitted: weight scales that may clip.
        solved: codes by GPTQ.
        rounds: how often the low-rank branch is fitted anew to what codes leave.
    """

    alpha: float | None
    sizes: tuple[int, ...]
    polarity: Polarity = Polarity.ONE
    clip: bool = False
    fitted: bool = False
    solved: bool = False
    rounds: int = 0

    def __str__(self) -> str:
        words = ["unsmoothed" if self.alpha is None else f"α={self.alpha:g}"]
        words += [f"{len(self.sizes)} inputs"] if len(self.sizes) > 1 else []
        words += [str(self.polarity)] if self.polarity is not Polarity.ONE else []
        flags = {"clip": self.clip, "fitted": self.fitted, "gptq": self.solved}
        words += [word for word, on in flags.items() if on]
        return " ".join([*words, f"{self.rounds} rounds"] if self.rounds else words)


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    plan: _Plan
    product: SegmentProduct
    error: float


class _Search:
    """Tries plans for one problem."""

    def __init__(self, problem: LayerProblem) -> None:
        self.problem = problem
        self.opt, self.calib = problem.settings.opt, problem.settings.calib
        self.sample = thinned(problem.inputs.rows, SEARCH_ROWS)
        self.tried: dict[str, float] = {}
        self._targets: dict[int, torch.Tensor] = {}
        self._weights: dict[float | None, SmoothedWeight] = {}
        self._settled: dict[_Plan, _Made] = {}

    def settle(self) -> _Made:
        """Smoothing, cuts and dual scales of least error on a sample; codes to nearest."""
        alphas = self._alphas()
        best = self._least(self._shapes(alphas[0]))
        if len(alphas) > 1:
            # The shape that suits unsmoothed inputs is what α is searched with; then all shapes once more.
            best = self._least([replace(best.plan, alpha=alpha) for alpha in alphas])
            best = self._least(self._shapes(best.plan.alpha))
        return best

    def _least(self, plans: Sequence[_Plan]) -> _Made:
        return min((self._made(plan) for plan in plans), key=_price)

    def _made(self, plan: _Plan) -> _Made:
        if plan not in self._settled:
            self._settled[plan] = self._make(plan, self.sample)
        return self._settled[plan]

    def refine(self, settled: _Made) -> SolvedLayer:
        """Scales, then codes, then the low-rank branch: each step where held-out rows gain by it."""
        held = self.problem.inputs.held
        best = replace(settled, error=self._error(settled.product, held))
        for step in self._steps():
            made = self._make(step(best.plan), held)
            if made.error < best.error or not self.opt.keep_best:
                best = made
        if self.opt.type is Optimum.SVD:
            best = self._alternate(best, held)
        return SolvedLayer([best.product], best.error, str(best.plan), self.tried)

    def smoothing(self, alpha: float | None) -> torch.Tensor | None:
        """What inputs are divided by."""
        if self.problem.smoothing is not None:
            return self.problem.smoothing[1]
        if alpha is None:
            return None
        scales = smoothing_scales(self.problem.inputs.peak, self.problem.weight, alpha)
        return scales.clamp_(_LEAST_SCALE, _MOST_SCALE)

    def energy(self) -> float:
        """‖y‖² of the sample."""
        return float(self._target(self.sample).square().sum())

    def _alphas(self) -> list[float | None]:
        if self.problem.smoothing is not None:
            return [self.problem.smoothing[0]]
        if self.opt.type is Optimum.DEFAULT:
            return [None]
        return [None, *self.opt.alphas()] if self.opt.keep_best else list(self.opt.alphas())

    def _shapes(self, alpha: float | None) -> list[_Plan]:
        """Every way to cut inputs and to treat their signs."""
        sizes = self.problem.cut.inputs
        whole = (sum(sizes),)
        low, high = -float(self.problem.inputs.low.min()), float(self.problem.inputs.high.max())
        asymmetric = self.problem.activated and min(low, high) <= _ASYMMETRY * max(low, high)
        polarities = self.problem.settings.input_quant.polarities(asymmetric=asymmetric)
        cuts = [whole, sizes] if sizes != whole else [whole]
        return [_Plan(alpha, cut, polarity) for polarity in polarities for cut in cuts]

    def _steps(self) -> Iterator[Callable[[_Plan], _Plan]]:
        static = not self.problem.settings.input_quant.dynamic
        coded = self.problem.settings.weight_quant.type.quant_type is not None
        if self.calib.search_range:
            if static and self.problem.settings.input_quant.type.quant_type is not None:
                yield lambda plan: replace(plan, clip=True)
            if coded:
                yield lambda plan: replace(plan, fitted=True)
        if self.calib.type is Calibrate.GPTQ:
            yield lambda plan: replace(plan, solved=True)

    def _alternate(self, best: _Made, held: torch.Tensor) -> _Made:
        """Fit the branch to what codes leave, then codes to what the branch leaves, while that helps."""
        smoothed = self._smoothed(best.plan.alpha)
        exact = smoothed.gram(self.problem.inputs.fit)
        made = best
        for rounds in range(1, self.opt.iterations + 1):
            left = smoothed.weight - made.product.weight.values()
            branch = low_rank_branch(left, self.opt, self.problem.dtype, exact)
            made = self._make(replace(made.plan, rounds=rounds), held, branch)
            if made.error < best.error or not self.opt.keep_best:
                best = made
            elif rounds > 1:
                break
        return best

    def _make(self, plan: _Plan, rows: torch.Tensor, branch: Factors | None = None) -> _Made:
        settings, inputs = self.problem.settings, self.problem.inputs
        smoothed = self._smoothed(plan.alpha)
        form = settings.input_quant.form(plan.polarity)
        rounding = input_rounding(form, plan.sizes, inputs, smoothed, clip=plan.clip)
        metric = None
        if plan.fitted or plan.solved:
            fit = rounding(smoothed.inputs(inputs.fit))
            metric = fit.T @ fit / len(fit)
        up, down = branch or smoothed.branch or (None, None)
        left = smoothed.weight if up is None or down is None else smoothed.weight - up.float() @ down.float()
        codes = round_segments(
            left, settings.weight_quant, self.calib, WeightCut(self.problem.cut.outputs, plan.sizes),
            gram=metric, search=plan.fitted, solve=plan.solved,
        )  # fmt: skip
        product = SegmentProduct(rounding, codes, smoothing=smoothed.smoothing, up=up, down=down)
        error = self._error(product, rows)
        self.tried[str(plan)] = error
        return _Made(plan, product, error)

    def _target(self, rows: torch.Tensor) -> torch.Tensor:
        key = id(rows)
        if key not in self._targets:
            self._targets[key] = rows @ self.problem.weight.T
        return self._targets[key]

    def _error(self, product: SegmentProduct, rows: torch.Tensor) -> float:
        target = self._target(rows)
        return float((product(rows) - target).square().sum() / target.square().sum().clamp_min(1e-30))

    def _smoothed(self, alpha: float | None) -> SmoothedWeight:
        if alpha not in self._weights:
            weight, dtype = self.problem.weight, self.problem.dtype
            self._weights[alpha] = SmoothedWeight.of(weight, self.smoothing(alpha), self.opt, dtype)
        return self._weights[alpha]


def _price(made: _Made) -> float:
    """The error, a little more where inputs need several products: they have to earn them."""
    several = len(made.plan.sizes) > 1 or made.plan.polarity is Polarity.TWO
    return made.error * (_PRODUCTS_PRICE if several else 1)


def _together(parts: Sequence[_Search], errors: Sequence[float]) -> float:
    energies = [each.energy() for each in parts]
    total = sum(error * energy for error, energy in zip(errors, energies, strict=True))
    return total / max(sum(energies), 1e-30)
