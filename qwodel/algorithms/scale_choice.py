"""Choosing dequant scales: the plain absolute maximum, or a search that minimises an error.

Objectives, each separable over scale groups, with E = W − Ŵ:

* no statistics: ‖E‖²;
* ``channel_weights`` d (mean squared activation of each input): Σ d_j E_ij²;
* ``gram`` H = XᵀX of the layer's inputs: tr(E H Eᵀ) = ‖X Eᵀ‖², the output error. Groups that
  share a row interact through H; each is judged by its own diagonal block of H.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn.functional import pad

from qwodel.algorithms.determinism import one_thread
from qwodel.algorithms.grid import round_to_grid
from qwodel.algorithms.quant_types import Granularity, QuantType
from qwodel.algorithms.tiles import (
    check_finite,
    check_matrix,
    column_blocks,
    expand_scale,
    group_amax,
    group_sum,
    row_chunks,
    sum_rows,
)
from qwodel.exceptions import ConfigurationError, ValidationError

__all__ = ["absmax_scale", "check_channel_weights", "check_gram", "normalise", "search_scale"]

_FP32 = torch.finfo(torch.float32)
_COLUMNS = 256  # of a Gram matrix at a time
_GAIN = 1e-6  # a candidate must win by more than the noise of fp32 sums


def absmax_scale(weight: torch.Tensor, quant_type: QuantType, granularity: Granularity) -> torch.Tensor:
    """The smallest scale with which nothing saturates: max |w| / qmax of each group, or the power of two above it.

    Groups of zeros (and empty ones) get 1, groups too small for it the smallest normal
    fp32, so that a scale is always a positive normal number.

    Args:
        weight: ``[M, N]``, any floating dtype.

    Returns:
        fp32 dequant scale of shape ``granularity.scale_shape(weight.shape)``.

    Raises:
        ValidationError: not a floating-point matrix, NaN or Inf in it, or values beyond fp32.
    """
    check_matrix(weight)
    shape = granularity.scale_shape(weight.shape)
    peaks = [
        group_amax(_magnitudes(weight[rows]), granularity) for rows in row_chunks(weight.shape, granularity)
    ]
    peak = _values(torch.cat(peaks), weight.dtype) if peaks else weight.new_zeros(shape, dtype=torch.float64)
    if not shape:
        peak = peak.amax() if peak.numel() else peak.new_zeros(())
    if not peak.isfinite().all():
        check_finite(weight)
    if bool((peak > _FP32.max).any()):
        raise ValidationError(f"the weight reaches {float(peak.max()):.3g}, which no fp32 scale can express")
    # One ulp inside the range, so that qmax · scale does not round up to infinity.
    ceiling = _FP32.max / quant_type.qmax * (1 - _FP32.eps)
    scale = (peak / quant_type.qmax).clamp_(_FP32.tiny, ceiling).float()
    if quant_type.power_of_two_scales:
        scale = _power_of_two(scale)
    return torch.where(peak == 0, 1.0, scale)


def _power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The least powers of two that are not below."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())


def _magnitudes(rows: torch.Tensor) -> torch.Tensor:
    """What orders like |rows|: for 16-bit floats their bits without the sign, which CPUs compare in bulk."""
    if rows.dtype.itemsize == 2:
        return rows.view(torch.int16).bitwise_and(0x7FFF)
    return rows.abs()


def _values(magnitudes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers, in fp64, that :func:`_magnitudes` made of ``dtype``."""
    return (magnitudes.view(dtype) if dtype.itemsize == 2 else magnitudes).double()


def normalise(
    weight: torch.Tensor, scale: torch.Tensor, granularity: Granularity, rows: slice
) -> torch.Tensor:
    """A chunk of rows divided by its scale, as fp32."""
    work = _work_dtype(weight)
    spread = expand_scale(scale, granularity, rows, weight.shape[1]).to(work)
    return weight[rows].to(work, copy=True).div_(spread).float()


def _work_dtype(weight: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def check_gram(gram: torch.Tensor, columns: int) -> torch.Tensor:
    """A Gram matrix as fp32 ``[N, N]`` scaled to a mean diagonal of 1.

    Raises:
        ValidationError: wrong shape, not finite, not symmetric or with a negative diagonal.
    """
    if gram.shape != (columns, columns):
        raise ValidationError(
            f"a Gram matrix of shape {list(gram.shape)} does not fit {columns} input channels"
        )
    if not bool(gram.sum().isfinite()):
        check_finite(gram, "the Gram matrix")
    diagonal = gram.diagonal().double()
    if bool((diagonal < 0).any()):
        raise ValidationError("the Gram matrix has a negative diagonal, so it is no XᵀX")
    mean = float(diagonal.mean()) if columns else 0.0
    scaled = (gram / mean).float() if mean > 0 else gram.float()
    for start in range(0, columns, _COLUMNS):
        strip = slice(start, start + _COLUMNS)
        upper, lower = scaled[strip, start:], scaled[start:, strip].T
        if not (torch.equal(upper, lower) or torch.allclose(upper, lower, rtol=1e-2, atol=1e-3)):
            raise ValidationError("the Gram matrix is not symmetric")
    return scaled


class _Metric:
    """The inner product ⟨A, B⟩ of every scale group of a chunk of rows."""

    def __init__(
        self,
        granularity: Granularity,
        columns: int,
        channel_weights: torch.Tensor | None,
        gram: torch.Tensor | None,
    ) -> None:
        self.granularity = granularity
        self.channel_weights = (
            None if channel_weights is None else check_channel_weights(channel_weights, columns)
        )
        self.gram = None if gram is None else check_gram(gram, columns)
        if self.gram is not None and granularity.is_block:
            self.gram = _diagonal_blocks(self.gram, granularity.block_cols)

    def square(self, a: torch.Tensor) -> torch.Tensor:
        """⟨A, A⟩ of each group; over a whole Gram matrix, for little more than half a product."""
        if self.gram is None or self.gram.ndim == 3:
            return self.products(a, a)[0]
        columns = []
        for start in range(0, a.shape[1], _COLUMNS):
            block = slice(start, start + _COLUMNS)
            own = a[:, block] @ self.gram[block, block]
            columns.append(own.addmm_(a[:, :start], self.gram[:start, block], alpha=2))
        return group_sum(torch.cat(columns, dim=1).mul_(a), self.granularity)

    def products(self, a: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
        """⟨A, B⟩ of each group, for each B."""
        if self.gram is None:
            weighted = a if self.channel_weights is None else a * self.channel_weights
        elif self.gram.ndim == 2:
            weighted = a @ self.gram
        else:
            blocks = column_blocks(a, self.granularity).transpose(0, 1)
            weighted = (blocks @ self.gram).transpose(0, 1).flatten(1)[:, : a.shape[1]]
        return [group_sum(weighted * b, self.granularity) for b in others]


def check_channel_weights(weights: torch.Tensor, columns: int) -> torch.Tensor:
    """Channel weights as fp32 ``[N]`` scaled to a mean of 1.

    Raises:
        ValidationError: wrong shape, not finite or negative.
    """
    if weights.shape != (columns,):
        raise ValidationError(
            f"channel weights of shape {list(weights.shape)} do not fit {columns} input channels"
        )
    check_finite(weights, "the channel weights")
    if bool((weights < 0).any()):
        raise ValidationError("channel weights are mean squares: they cannot be negative")
    mean = float(weights.double().mean()) if columns else 0.0
    return (weights / mean).float() if mean > 0 else weights.float()


def _diagonal_blocks(gram: torch.Tensor, size: int) -> torch.Tensor:
    """``[N, N]`` → ``[⌈N/size⌉, size, size]``, the ragged last block padded with zeros."""
    padding = -gram.shape[0] % size
    padded = pad(gram, (0, padding, 0, padding))
    return torch.stack([padded[i : i + size, i : i + size] for i in range(0, padded.shape[0], size)])


def search_scale(
    weight: torch.Tensor,
    quant_type: QuantType,
    granularity: Granularity,
    *,
    gram: torch.Tensor | None = None,
    channel_weights: torch.Tensor | None = None,
    candidates: int | None = None,
) -> torch.Tensor:
    """The scale of least error of each group among candidates, refitted by least squares.

    FP8 candidates cover exactly one octave above absmax: the grid repeats with every power
    of two, so a wider search finds nothing new. INT8 candidates clip down to half of absmax.
    A group keeps its absmax scale unless another is better under the objective (see the
    module), so the result is never worse, group by group.

    Args:
        weight: ``[M, N]``, any floating dtype.
        gram: ``[N, N]`` XᵀX of real activations, up to a factor.
        channel_weights: ``[N]`` mean squared activations, up to a factor.
        candidates: how many scales to try; 32, or 12 with ``gram`` (each costs a matrix product).

    Returns:
        fp32 dequant scale of shape ``granularity.scale_shape(weight.shape)``.

    Raises:
        ValidationError: as :func:`absmax_scale`, or statistics that do not fit.
        ConfigurationError: both ``gram`` and ``channel_weights`` were given, or no candidates.
    """
    if gram is not None and channel_weights is not None:
        raise ConfigurationError(
            "give either gram or channel_weights: a Gram matrix already holds the weights"
        )
    count = (12 if gram is not None else 32) if candidates is None else candidates
    if count < 1:
        raise ConfigurationError(f"a search needs at least one candidate, not {candidates}")
    base = absmax_scale(weight, quant_type, granularity)
    # On a grid that repeats with every power of two, another one wins nothing.
    if weight.numel() == 0 or quant_type.power_of_two_scales:
        return base
    metric = _Metric(granularity, weight.shape[1], channel_weights, gram)
    search = _Search(weight, quant_type, granularity, base, metric)
    with nullcontext() if gram is None else one_thread():
        for k in range(count):
            search.consider(torch.full_like(base, _ratio(quant_type, k, count)))
        for _ in range(2):
            search.consider(search.refit())
    return base * search.best


def _ratio(quant_type: QuantType, k: int, count: int) -> float:
    return 2.0 ** (k / count) if quant_type.is_float else 1.0 - 0.5 * k / count


class _Search:
    """Keeps, for each scale group, the best ratio to the absmax scale met so far."""

    def __init__(
        self,
        weight: torch.Tensor,
        quant_type: QuantType,
        granularity: Granularity,
        base: torch.Tensor,
        metric: _Metric,
    ) -> None:
        self.weight, self.quant_type, self.granularity = weight, quant_type, granularity
        self.base, self.metric = base, metric
        self.best = torch.ones_like(base)
        self.cost: torch.Tensor | None = None

    def consider(self, ratio: torch.Tensor) -> None:
        """Take the ratio in those groups where it is better."""

        def cost(x: torch.Tensor, r: torch.Tensor) -> list[torch.Tensor]:
            return [self.metric.square(round_to_grid(x / r, self.quant_type).mul_(r).sub_(x))]

        (found,) = self._each_group(cost, ratio)
        if self.cost is None:
            self.best, self.cost = ratio, found
            return
        better = found < self.cost * (1 - _GAIN)
        self.best = torch.where(better, ratio, self.best)
        self.cost = torch.where(better, found, self.cost)

    def refit(self) -> torch.Tensor:
        """The least-squares ratio for the codes that the best ratio gives: ⟨x, q⟩ / ⟨q, q⟩."""

        def products(x: torch.Tensor, r: torch.Tensor) -> list[torch.Tensor]:
            q = round_to_grid(x / r, self.quant_type)
            return self.metric.products(q, x, q)

        cross, square = self._each_group(products, self.best)
        ratio = (cross / square).float()
        usable = ratio.isfinite() & (ratio > 0.25) & (ratio < 4)
        return torch.where(usable, ratio, self.best)

    def _each_group(
        self, measure: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]], ratio: torch.Tensor
    ) -> list[torch.Tensor]:
        """``measure(x, ratio)`` of every group, for x = w / absmax scale; each shaped like the scale."""
        parts = []
        for rows in row_chunks(self.weight.shape, self.granularity):
            x = normalise(self.weight, self.base, self.granularity, rows)
            parts.append(measure(x, expand_scale(ratio, self.granularity, rows, x.shape[1])))
        whole = [torch.cat(chunks) for chunks in zip(*parts, strict=True)]
        return whole if self.base.ndim else [sum_rows(each) for each in whole]
