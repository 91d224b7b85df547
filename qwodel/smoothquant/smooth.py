"""Smoothing a model in place, every step of it proved on a probe batch."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from qwodel.exceptions import ConfigurationError, ValidationError
from qwodel.modeling.fold import fold_scales, remember_weights
from qwodel.modeling.pairs import Pair
from qwodel.modeling.wiring import find_pairs
from qwodel.modeling.wiring_probe import default_probe
from qwodel.modeling.wiring_table import ProducerKind
from qwodel.smoothquant.head_rotation import rotate_heads, rotate_last_axis
from qwodel.smoothquant.observe import ActivationStatistics
from qwodel.smoothquant.scheme import Scheme
from qwodel.smoothquant.search import GRID, PairScaling, best_choice, pair_scales

__all__ = ["TOLERANCE", "Alpha", "PairReport", "Smoothed", "smooth_lm", "smooth_model"]

log = logging.getLogger(__name__)

Alpha = float | Literal["search"]
TOLERANCE = 1e-5
"""Greatest relative change of the logits that a smoothing may make."""

_PROBE_TOKENS = 24
_PROBE_SEED = 1  # other tokens than those that pairs are found with
_LAYER = re.compile(r"(.*?\.\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class PairReport:
    """What was done with a pair.

    Attributes:
        producer, consumers, kind: the pair.
        alpha: ``None`` where it was not scaled.
        rotated: its value heads were rotated.
        error_before, error_after: relative output errors of a search.
        change: relative change of the logits, where it was refused for that.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: ProducerKind
    alpha: float | None = None
    rotated: bool = False
    error_before: float | None = None
    error_after: float | None = None
    change: float | None = None


@dataclass(frozen=True, slots=True)
class Smoothed:
    """The result of a smoothing.

    Attributes:
        pairs: what was done with each pair.
        change: relative change of the logits, all smoothings together.
        undone: producers whose smoothing changed the function and was taken back.
    """

    pairs: tuple[PairReport, ...]
    change: float

    @property
    def undone(self) -> tuple[str, ...]:
        """Names of those producers."""
        return tuple(each.producer for each in self.pairs if each.change is not None)


def smooth_lm(
    model: nn.Module,
    scales: Mapping[str, torch.Tensor] | ActivationStatistics,
    alpha: Alpha = 0.5,
    *,
    inner_alpha: Alpha | None = None,
    scheme: Scheme | None = None,
    probe: torch.Tensor | None = None,
) -> None:
    """Move the difficulty of outlier activations into the weights; the function stays as it was.

    See :func:`smooth_model`, which also returns what it did.

    Args:
        model: a transformers language model, changed in place.
        scales: layer → greatest value of each input channel.
        alpha: share of the activations' difficulty that the weights take over, in [0, 1].
    """
    smooth_model(model, scales, alpha, inner_alpha=inner_alpha, scheme=scheme, probe=probe)


def smooth_model(
    model: nn.Module,
    scales: Mapping[str, torch.Tensor] | ActivationStatistics,
    alpha: Alpha = 0.5,
    *,
    inner_alpha: Alpha | None = None,
    head_rotations: bool = False,
    scheme: Scheme | None = None,
    grid: Sequence[float] = GRID,
    probe: torch.Tensor | None = None,
    pairs: Iterable[Pair] | None = None,
) -> Smoothed:
    """Smooth a model in place and say what was done.

    After each decoder layer the logits of a probe batch are compared with those before it. Where they
    changed by more than 1e-5, its smoothings are undone and tried one by one, and those at fault are
    left out and named in a warning. A model in fp16 or bf16 is smoothed by powers of two, which its
    arithmetic passes on without any rounding.

    Args:
        model: a transformers language model, best in fp32.
        scales: greatest values of the layers' inputs; with samples (from ``calibrate``) for a search.
        alpha: of norms and the layers behind them: a number in [0, 1], or ``"search"`` for the one of
            least output error under ``scheme`` (none, where every value makes it worse).
        inner_alpha: of up → down and value → output projections; ``None`` searches where ``alpha`` is
            searched and else leaves them alone, as the published method does: a number that suits
            norms may ruin them.
        head_rotations: a search may rotate value heads instead.
        scheme: what the search rounds with; a scale a channel and a token where ``None``.
        grid: values of α that a search tries.
        probe: int64 token ids ``[batch, tokens]``; fixed ones where ``None``.
        pairs: instead of the model's wiring.

    Raises:
        ValidationError: ``unsupported model architecture …``: nothing is known of its wiring, or no
            smoothing leaves its function as it is.
        CalibrationError: ``scales not found for layer …``.
        ConfigurationError: α outside [0, 1].
    """
    for value in (alpha, inner_alpha):
        if isinstance(value, str):
            if value != "search":
                raise ConfigurationError(f"alpha is a number in [0, 1] or 'search', not {value!r}")
        elif value is not None and not 0 <= value <= 1:
            raise ConfigurationError(f"alpha lies in [0, 1], not {value}")
    if inner_alpha is None and alpha == "search":
        inner_alpha = "search"
    given = scales if isinstance(scales, ActivationStatistics) else ActivationStatistics(dict(scales))
    run = _Smoothing(
        model,
        ActivationStatistics(dict(given.peaks), dict(given.samples)),
        alpha,
        inner_alpha,
        head_rotations,
        scheme or Scheme(),
        tuple(grid),
        default_probe(model, tokens=_PROBE_TOKENS, seed=_PROBE_SEED) if probe is None else probe,
    )
    return run.run(tuple(find_pairs(model, probe) if pairs is None else pairs))


@dataclass(slots=True)
class _Smoothing:
    model: Any
    statistics: ActivationStatistics
    alpha: Alpha
    inner_alpha: Alpha | None
    head_rotations: bool
    scheme: Scheme
    grid: tuple[float, ...]
    probe: torch.Tensor
    reports: list[PairReport] = field(default_factory=list)
    power_of_two: bool = False

    def run(self, pairs: tuple[Pair, ...]) -> Smoothed:
        # Missing scales show before anything is changed.
        for pair in pairs:
            if self._alpha_of(pair) is not None:
                pair_scales(self.model, pair, self.statistics.peaks, 0.5)
        self.power_of_two = next(self.model.parameters()).dtype not in (torch.float32, torch.float64)
        training = self.model.training
        self.model.eval()
        try:
            first = logits = self._logits()
            for group in _by_layer(pairs):
                logits = self._layer(group, logits)
        finally:
            self.model.train(training)
        result = Smoothed(tuple(self.reports), _change(first, logits))
        if result.undone and len(result.undone) == len(pairs):
            kind = type(self.model).__name__
            raise ValidationError(
                f"unsupported model architecture {kind}: every smoothing changes its logits",
                hint="load the model in float32"
                if self.power_of_two
                else "its wiring is not as its name says",
            )
        return result

    def _layer(self, pairs: tuple[Pair, ...], before: torch.Tensor) -> torch.Tensor:
        """Smooth one layer's pairs together, or one by one where that fails; return the logits then."""
        known, count = (dict(self.statistics.peaks), dict(self.statistics.samples)), len(self.reports)
        restore = remember_weights(self.model, pairs)
        try:
            for pair in pairs:
                self.reports.append(self._apply(pair))
            after = self._logits()
        except BaseException:
            restore()
            raise
        change = _change(before, after)
        if change <= TOLERANCE:
            return after
        restore()
        del self.reports[count:]
        self.statistics.peaks, self.statistics.samples = known
        if len(pairs) == 1:
            pair = pairs[0]
            log.warning("smoothing %s changed the logits by %.2g and was undone", pair.producer, change)
            self.reports.append(PairReport(pair.producer, pair.consumers, pair.kind, change=change))
            return before
        for pair in pairs:
            before = self._layer((pair,), before)
        return before

    def _apply(self, pair: Pair) -> PairReport:
        choice, plain = self._choose(pair)
        peaks, samples = self.statistics.peaks, self.statistics.samples
        if choice.scales is not None:
            fold_scales(self.model, pair, choice.scales)
            spread = pair.spread(choice.scales)
            for name in pair.consumers:
                # What consumers read has changed with the fold.
                for known in (peaks, samples):
                    if name in known:
                        known[name] = known[name] / spread
        if choice.rotate:
            rotate_heads(self.model, pair)
            for name in pair.consumers:
                samples[name] = rotate_last_axis(samples[name], pair.head_dim)
                peaks[name] = samples[name].abs().amax(dim=0)
        return PairReport(
            pair.producer, pair.consumers, pair.kind, choice.alpha, choice.rotate, plain, choice.error
        )

    def _choose(self, pair: Pair) -> tuple[PairScaling, float | None]:
        alpha = self._alpha_of(pair)
        if alpha is None:
            return PairScaling(), None
        if alpha == "search":
            return best_choice(
                self.model,
                pair,
                self.statistics,
                self.scheme,
                grid=self.grid,
                rotate=self.head_rotations,
                power_of_two=self.power_of_two,
            )
        scales = pair_scales(
            self.model, pair, self.statistics.peaks, float(alpha), power_of_two=self.power_of_two
        )
        return PairScaling(scales, float(alpha)), None

    def _alpha_of(self, pair: Pair) -> Alpha | None:
        return (
            self.alpha if pair.kind in (ProducerKind.NORM, ProducerKind.NORM_PLUS_ONE) else self.inner_alpha
        )

    @torch.no_grad()
    def _logits(self) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=self.probe, use_cache=False).logits
        return logits.double()


def _change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm().clamp_min(1e-30))


def _by_layer(pairs: tuple[Pair, ...]) -> Iterator[tuple[Pair, ...]]:
    layers: dict[str, list[Pair]] = {}
    for pair in pairs:
        match = _LAYER.match(pair.producer)
        layers.setdefault(match[1] if match else pair.producer, []).append(pair)
    for group in layers.values():
        yield tuple(group)
