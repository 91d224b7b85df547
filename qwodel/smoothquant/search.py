"""Choosing how a pair is smoothed, by what quantization does to the outputs of the layers concerned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qwodel.algorithms.hadamard import convrot_weight
from qwodel.algorithms.smoothing import smoothing_scales
from qwodel.exceptions import CalibrationError
from qwodel.modeling.pairs import Pair, input_weight, output_weight
from qwodel.modeling.wiring_table import ProducerKind
from qwodel.smoothquant.fake_quant import fake_quantize
from qwodel.smoothquant.head_rotation import can_rotate_heads, rotate_last_axis
from qwodel.smoothquant.observe import ActivationStatistics
from qwodel.smoothquant.scheme import Scheme

__all__ = ["GRID", "PairScaling", "best_choice", "pair_scales", "peak_of"]

GRID = tuple(step / 10 for step in range(11))
"""Values of α that a search tries, both ends included."""

_WORTH = 0.8
"""Scales between two matrices are taken only where they leave less of the error than this.

The channels behind an activation function are large for a few tokens of a text and not for those of
another: the smallest gains on the calibration text do not last on other text.
"""

_ROWS = 384  # output channels that errors are measured on; more tell the same


@dataclass(frozen=True, slots=True)
class PairScaling:
    """What is done with a pair.

    Attributes:
        scales: ``[channels]``; ``None`` does not scale.
        alpha: where they come from.
        rotate: rotate the value heads.
        error: relative squared output error, summed over the layers concerned.
    """

    scales: torch.Tensor | None = None
    alpha: float | None = None
    rotate: bool = False
    error: float | None = None

    @property
    def changes(self) -> bool:
        """Whether anything is done."""
        return self.scales is not None or self.rotate


def peak_of(pair: Pair, peaks: dict[str, torch.Tensor]) -> torch.Tensor:
    """The greatest value of each channel that the pair's consumers read, ``[consumer inputs]``.

    Raises:
        CalibrationError: ``scales not found for layer …``, or they are another model's.
    """
    found = [peaks[alias] for name in pair.consumers for alias in _aliases(name) if alias in peaks]
    columns = pair.channels * pair.groups
    if not found:
        raise CalibrationError(
            f"scales not found for layer {pair.consumers[0]}",
            hint="compute the activation scales on this very model",
        )
    if any(len(each) != columns for each in found):
        raise CalibrationError(
            f"scales of layer {pair.consumers[0]} have {len(found[0])} channels, and it reads {columns}",
            hint="compute the activation scales on this very model",
        )
    return torch.stack([each.float() for each in found]).amax(dim=0)


def _aliases(name: str) -> Iterator[str]:
    """A layer's name now, and in files of earlier transformers releases."""
    yield name
    if ".mlp." in name:
        yield name.replace(".mlp.", ".block_sparse_moe.")


def pair_scales(
    model: nn.Module, pair: Pair, peaks: dict[str, torch.Tensor], alpha: float, *, power_of_two: bool = False
) -> torch.Tensor:
    """s_j = max|X_j|^α / max|W_j|^(1−α) of a pair, fp32 ``[channels]``.

    Value channels take the greatest over the heads that repeat them. Scales between two matrices have
    the geometric mean 1: their size would only shift weights within a fused producer.
    """
    activation = _channels(pair, peak_of(pair, peaks))
    weight = torch.stack([_matrix(model, name).abs().amax(dim=0) for name in pair.consumers]).amax(dim=0)
    scales = smoothing_scales(activation, _channels(pair, weight.float().cpu())[None], alpha)
    if pair.kind in (ProducerKind.LINEAR, ProducerKind.VALUE):
        scales = scales / scales.log().mean().exp()
    return torch.exp2(scales.log2().round()) if power_of_two else scales


def best_choice(
    model: nn.Module,
    pair: Pair,
    statistics: ActivationStatistics,
    scheme: Scheme,
    *,
    grid: Sequence[float] = GRID,
    rotate: bool = False,
    power_of_two: bool = False,
) -> tuple[PairScaling, float]:
    """Return the choice of least output error, and the error of leaving the pair as it is.

    Args:
        rotate: also try to rotate value heads.

    Raises:
        CalibrationError: nothing was sampled of the layers.
    """
    measure = _Measure(model, pair, statistics, scheme)
    plain = measure(None)
    inner = pair.kind in (ProducerKind.LINEAR, ProducerKind.VALUE)
    candidates = [PairScaling(error=plain)]
    for alpha in grid:
        scales = pair_scales(model, pair, statistics.peaks, alpha, power_of_two=power_of_two)
        error = measure(scales)
        if error < (_WORTH * plain if inner else plain):
            candidates.append(PairScaling(scales, alpha, error=error))
    if rotate and can_rotate_heads(pair):
        candidates.append(PairScaling(rotate=True, error=measure(None, rotate=True)))
    return min(candidates, key=lambda choice: choice.error or 0.0), plain


def _matrix(model: nn.Module, name: str) -> torch.Tensor:
    """A consumer's weight as ``[outputs, inputs]``; stacked experts one under the other."""
    weight, axis = input_weight(model, name)
    return weight.detach().movedim(axis, -1).reshape(-1, weight.shape[axis])


def _channels(pair: Pair, values: torch.Tensor) -> torch.Tensor:
    """The greatest of the values that belong to one channel of the pair."""
    if pair.groups == 1:
        return values
    heads = values.reshape(-1, pair.groups, pair.head_dim)
    return heads.amax(dim=1).reshape(-1)


class _Measure:
    """The error that quantization makes in a pair's consumers, and in its producer where that changes."""

    def __init__(
        self, model: nn.Module, pair: Pair, statistics: ActivationStatistics, scheme: Scheme
    ) -> None:
        self.pair, self.scheme = pair, scheme
        name = next((each for each in pair.consumers if each in statistics.samples), None)
        if name is None:
            raise CalibrationError(
                f"scales not found for layer {pair.consumers[0]}: a search of α needs samples of its inputs",
                hint="calibrate with sampled_tokens, or give α as a number",
            )
        self.inputs, self.peak = statistics.samples[name], peak_of(pair, statistics.peaks)
        self.weights = [_matrix(model, each).float().cpu() for each in pair.consumers]
        if scheme.weights == "channel":
            self.weights = [_some_rows(weight) for weight in self.weights]
        self.targets = [self.inputs @ _some_rows(weight).T for weight in self.weights]
        self.producer: Callable[[torch.Tensor | None, bool], float] | None = None
        between = pair.kind in (ProducerKind.LINEAR, ProducerKind.VALUE)
        # A producer with a scale a row takes any scaling of its rows without a change.
        if between and scheme.weights == "tensor" and pair.producer in statistics.samples:
            self._watch_producer(model, statistics.samples[pair.producer])

    def __call__(self, scales: torch.Tensor | None, *, rotate: bool = False) -> float:
        spread = None if scales is None else self.pair.spread(scales)
        size = self.pair.head_dim if rotate else 0
        inputs = self.inputs if spread is None else self.inputs / spread
        inputs = rotate_last_axis(inputs, size) if rotate else inputs
        rotation = self.scheme.rotation(inputs.shape[-1])
        if rotation:
            inputs = convrot_weight(inputs, rotation)
        rounded = self._round_inputs(inputs, spread, known=not (rotate or rotation))
        total = 0.0
        for weight, target in zip(self.weights, self.targets, strict=True):
            moved = weight if spread is None else weight * spread
            moved = rotate_last_axis(moved, size) if rotate else moved
            moved = convrot_weight(moved, rotation) if rotation else moved
            total += _relative(rounded @ self._round_weight(moved).T, target)
        return total + (self.producer(scales, rotate) if self.producer else 0.0)

    def _round_inputs(
        self, inputs: torch.Tensor, spread: torch.Tensor | None, *, known: bool
    ) -> torch.Tensor:
        if self.scheme.activations == "token":
            return fake_quantize(inputs, "rows")
        peak = inputs.abs().amax()
        if known:  # the whole data's greatest value, not only the sample's
            peak = (self.peak if spread is None else self.peak / spread).amax()
        return fake_quantize(inputs, "tensor", (peak / 127).clamp(min=1e-12))

    def _round_weight(self, weight: torch.Tensor) -> torch.Tensor:
        if self.scheme.weights == "channel":
            return fake_quantize(weight, "rows")
        return fake_quantize(_some_rows(weight), "tensor", weight.abs().amax() / 127)

    def _watch_producer(self, model: nn.Module, inputs: torch.Tensor) -> None:
        parameter, axis = output_weight(model, self.pair.producer)
        weight = parameter.detach().movedim(axis, 0).float().cpu()
        target = inputs @ weight.T
        start, stop = self.pair.outputs

        def error(scales: torch.Tensor | None, rotate: bool) -> float:
            moved = weight.clone()
            if scales is not None:
                moved[start:stop] /= scales[:, None]
            if rotate:
                moved[start:stop] = rotate_last_axis(moved[start:stop].T, self.pair.head_dim).T
            rounded = fake_quantize(moved, "tensor")
            if scales is not None:
                rounded[start:stop] *= scales[:, None]
            if rotate:
                rounded[start:stop] = rotate_last_axis(rounded[start:stop].T, self.pair.head_dim).T
            return _relative(inputs @ rounded.T, target)

        self.producer = error


def _some_rows(weight: torch.Tensor) -> torch.Tensor:
    return weight[:: -(-len(weight) // _ROWS)]


def _relative(found: torch.Tensor, target: torch.Tensor) -> float:
    """Squared error over squared target: geometric mean of all tokens together and of the mean token.

    Together, a few massive tokens outweigh the others, whose errors add up to most of the loss; alone, the mean
    token would give away the massive ones, which attention rests on.
    """
    error, signal = (found - target).square().sum(dim=-1), target.square().sum(dim=-1)
    together = error.sum() / signal.sum().clamp_min(1e-20)
    mean = (error / signal.clamp_min(1e-20)).mean()
    return float((together * mean).sqrt())
