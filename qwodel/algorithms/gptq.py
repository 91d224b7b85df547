"""GPTQ: rounding column by column, each column's error made good by those still to come.

Frantar et al., https://arxiv.org/abs/2210.17323. With H = XᵀX of the layer's real inputs and
UᵀU = (H + λI)⁻¹, U upper triangular, the error of column i divided by U_ii is spread over the
columns behind it along row i of U. The objective is tr(E H Eᵀ) = ‖X Eᵀ‖², the output error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from qwodel.algorithms.grid import round_to_grid
from qwodel.algorithms.quant_types import TENSOR, Granularity, QuantType
from qwodel.algorithms.scale_choice import absmax_scale, check_gram, search_scale
from qwodel.algorithms.scales import Quantized, quantize
from qwodel.algorithms.tiles import check_matrix, expand_scale
from qwodel.exceptions import ConfigurationError

__all__ = [
    "DEFAULT_DAMPING",
    "BlockSolver",
    "GptqOptions",
    "GptqResult",
    "InverseFactor",
    "factorize",
    "gptq",
    "gptq_together",
    "output_error",
    "solve_block",
]

DEFAULT_DAMPING = 0.03
"""λ as a share of the mean diagonal."""

_DAMPING_STEP = 10.0
_MAX_DAMPING = 1.0

BlockSolver = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, QuantType], tuple[torch.Tensor, torch.Tensor]
]
"""``(columns [b, M], factor [b, b], scales [b, M or 1], type) → (rounded weights, scaled errors)``, both ``[b, M]``."""


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """How GPTQ works.

    Attributes:
        block_size: columns between two updates of all later columns; the codes do not depend on it.
        damping: λ as a share of the Gram matrix's mean diagonal; raised tenfold, up to 1, while the
            matrix cannot be factored.
        act_order: the columns with the largest inputs first.
        segments: parts in which the inverse factor is made; more of them need less memory, and less
            work, as U is triangular. The codes do not depend on it.
        segment_from: input channels from which it is made in parts.
        lazy: update later columns once a block; ``False`` updates them after every column.
        scale: ``"search"`` looks for the scales of least error in the norm of the Gram matrix's
            diagonal (the terms between columns are what GPTQ removes), ``"absmax"`` takes the
            smallest that clip nothing, ``"auto"`` is absmax for integers with a scale for each
            row, group or block, whose outliers are dear, and search for all others.
    """

    block_size: int = 32
    damping: float = DEFAULT_DAMPING
    act_order: bool = True
    lazy: bool = True
    segments: int = 4
    segment_from: int = 0
    scale: Literal["auto", "search", "absmax"] = "auto"

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigurationError(f"block_size counts columns, so it is not {self.block_size}")
        if self.segments < 1:
            raise ConfigurationError(f"segments are counted from 1, so there are not {self.segments}")
        if not 0 < self.damping <= _MAX_DAMPING:
            raise ConfigurationError(f"damping is a share of the mean diagonal in (0, 1], not {self.damping}")
        if self.scale not in ("auto", "search", "absmax"):
            raise ConfigurationError(f"scale is 'auto', 'search' or 'absmax', not {self.scale!r}")


@dataclass(frozen=True, slots=True)
class GptqResult:
    """A solved matrix.

    Attributes:
        quantized: codes and scales.
        loss: ‖X Eᵀ‖² of each row, fp64 ``[M]``, for a Gram matrix with mean diagonal 1.
        nearest_loss: the same of round-to-nearest with absmax scales; ``loss`` never exceeds it
            (in sum, where rows share scales).
        signal: ‖X Wᵀ‖² of each row, in the same unit.
        damping: the λ that was used, as a share of the mean diagonal.
        fell_back: why the whole matrix was rounded to nearest instead, or ``None``.
    """

    quantized: Quantized
    loss: torch.Tensor
    nearest_loss: torch.Tensor
    signal: torch.Tensor
    damping: float
    fell_back: str | None = None


def gptq(
    weight: torch.Tensor,
    quant_type: QuantType,
    granularity: Granularity,
    gram: torch.Tensor,
    options: GptqOptions | None = None,
    *,
    solver: BlockSolver | None = None,
) -> GptqResult:
    """Round a weight to codes of small output error; never worse than round-to-nearest.

    Scales are settled before the first column is rounded, so act-order needs no index of groups.

    Args:
        weight: ``[M, N]``, bf16, fp16, fp32 or fp64; solved in fp64 on the CPU, else in fp32.
        gram: ``[N, N]`` XᵀX of real inputs, up to a factor.
        solver: rounds one block of columns; :func:`solve_block` unless given.

    Raises:
        ValidationError: not a floating-point matrix, NaN or Inf in it, or a Gram matrix that does not fit.
    """
    return gptq_together([weight], quant_type, granularity, gram, options, solver=solver)[0]


def gptq_together(
    weights: Sequence[torch.Tensor],
    quant_type: QuantType,
    granularity: Granularity,
    gram: torch.Tensor,
    options: GptqOptions | None = None,
    *,
    solver: BlockSolver | None = None,
) -> list[GptqResult]:
    """:func:`gptq` of several weights with the same inputs, such as q, k and v, in one go.

    Rows are independent, so the codes are those of each weight alone.

    Args:
        weights: ``[M_i, N]`` each.

    Raises:
        ValidationError: as :func:`gptq`.
    """
    options = options or GptqOptions()
    for weight in weights:
        check_matrix(weight)
    metric = check_gram(gram, weights[0].shape[1])
    starts = [_nearest(weight, quant_type, granularity, metric, options) for weight in weights]
    if weights[0].shape[1] == 0:
        return starts
    factor = factorize(metric, options)
    if isinstance(factor, float):
        reason = f"its Gram matrix cannot be factored even with damping {factor:g}"
        return [replace(start, damping=factor, fell_back=reason) for start in starts]
    scales = [_choose_scale(weight, quant_type, granularity, metric, options) for weight in weights]
    rounded = _solve(weights, factor, scales, quant_type, granularity, options, solver or solve_block)
    results = []
    for weight, scale, start, values in zip(weights, scales, starts, rounded, strict=True):
        solved = quantize(values, quant_type, granularity, scale)
        loss = output_error(solved.dequantize() - _single(weight), metric)
        best, loss = _keep_better(solved, loss, start.quantized, start.loss)
        results.append(replace(start, quantized=best, loss=loss, damping=factor.damping))
    return results


def _nearest(
    weight: torch.Tensor,
    quant_type: QuantType,
    granularity: Granularity,
    gram: torch.Tensor,
    options: GptqOptions,
) -> GptqResult:
    nearest = quantize(weight, quant_type, granularity)
    target = _single(weight)
    loss = output_error(nearest.dequantize() - target, gram)
    return GptqResult(nearest, loss, loss, output_error(target, gram), options.damping)


def _single(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()


def output_error(error: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """``e H eᵀ`` of each row e of ``error`` ``[M, N]``, fp64 ``[M]``."""
    error = error.to(gram.device)
    return ((error @ gram.to(error.dtype)).double() * error).sum(dim=1).clamp_(min=0)


@dataclass(slots=True)
class InverseFactor:
    """U with UᵀU = (H + λI)⁻¹, upper triangular, made a few rows at a time.

    With J reversing the order, J H J = L Lᵀ gives U = J L⁻¹ J: the inverse itself is never formed,
    and only L and one segment of U are held.

    Attributes:
        lower: L, fp64 ``[N, N]``.
        order: column indices in the order of processing.
        damping: λ as a share of the mean diagonal.
        segment: rows of U made at once.
    """

    lower: torch.Tensor
    order: torch.Tensor
    damping: float
    segment: int
    _start: int = 0
    _rows: torch.Tensor | None = None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """``U[start:stop, start:]``, fp64."""
        first = start // self.segment * self.segment
        if self._rows is None or self._start != first:
            self._rows, self._start = self._solve(first, min(first + self.segment, len(self.order))), first
        return self._rows[start - first : stop - first, start - first :]

    def _solve(self, start: int, stop: int) -> torch.Tensor:
        """``U[start:stop, start:]``: rows of L⁻¹ solve x L = e, and are zero beyond their own index."""
        size = len(self.order) - start
        unit = torch.zeros(stop - start, size, dtype=self.lower.dtype, device=self.lower.device)
        index = torch.arange(stop - start, device=unit.device)
        unit[index, size - (stop - start) + index] = 1
        corner = self.lower[:size, :size]
        rows: torch.Tensor = torch.linalg.solve_triangular(corner, unit, upper=False, left=False)
        return rows.flip(0, 1)


def factorize(gram: torch.Tensor, options: GptqOptions) -> InverseFactor | float:
    """Factor the damped Gram matrix; the last damping tried where none helps.

    Inputs that are always zero get the mean on the diagonal: they are simply rounded.
    """
    diagonal = gram.diagonal()
    count = len(diagonal)
    order = torch.arange(count, device=gram.device)
    if options.act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    backwards = order.flip(0)
    work = gram.double()[backwards[:, None], backwards]
    mean = float(diagonal.double().mean()) or 1.0
    work.diagonal()[work.diagonal() == 0] = mean
    damping, added = options.damping, 0.0
    while True:
        work.diagonal().add_((damping - added) * mean)
        added = damping
        lower, failed = torch.linalg.cholesky_ex(work)
        if not int(failed) and bool(lower.diagonal().isfinite().all()):
            step = -(-count // (options.segments if count >= options.segment_from else 1))
            # Whole blocks, so that no block's rows lie in two segments.
            segment = -(-step // options.block_size) * options.block_size
            return InverseFactor(lower, order, damping, segment)
        if damping >= _MAX_DAMPING:
            return damping
        damping = min(damping * _DAMPING_STEP, _MAX_DAMPING)


def solve_block(
    columns: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, quant_type: QuantType
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``b`` columns one after the other.

    Products are formed before they are subtracted, so that every implementation rounds alike.

    Args:
        columns: ``[b, M]``, weights of one input a row; used as scratch space.
        factor: ``[b, b]``, the diagonal block of U.
        scales: ``[b, M]`` or ``[b, 1]`` dequant scales.

    Returns:
        the weights the codes stand for, and the errors divided by U_ii, each ``[b, M]``.
    """
    rounded, errors = torch.empty_like(columns), torch.empty_like(columns)
    pivots = factor.diagonal().tolist()
    spread = torch.empty_like(columns)
    for i, pivot in enumerate(pivots):
        column, scale = columns[i], scales[i]
        value = torch.mul(round_to_grid((column / scale).float(), quant_type), scale, out=rounded[i])
        error = torch.sub(column, value, out=errors[i]).div_(pivot)
        if i + 1 < len(pivots):
            rest = spread[i + 1 :]
            torch.mul(factor[i, i + 1 :, None], error, out=rest)
            columns[i + 1 :].sub_(rest)
    return rounded, errors


def _solve(
    weights: Sequence[torch.Tensor],
    factor: InverseFactor,
    scales: Sequence[torch.Tensor],
    quant_type: QuantType,
    granularity: Granularity,
    options: GptqOptions,
    solver: BlockSolver,
) -> tuple[torch.Tensor, ...]:
    """The weights that GPTQ's codes stand for, ``[M_i, N]`` each."""
    order, count = factor.order, len(factor.order)
    # In fp32 the order of sums turns a code here and there, and those after it.
    work = torch.float64 if order.device.type == "cpu" else torch.float32
    columns = torch.cat([weight.to(work).T for weight in weights], dim=1)[order]
    width = count if granularity.is_block else 1
    per_row = []
    for weight, scale in zip(weights, scales, strict=True):
        part = expand_scale(scale, granularity, slice(0, len(weight)), count).to(work)
        per_row.append(part.reshape(-1, width).expand(len(weight), width))
    spread = torch.cat(per_row).T
    spread = spread[order] if granularity.is_block else spread.expand(count, -1)
    rounded = torch.empty_like(columns)
    step = options.block_size if options.lazy else 1
    for start in range(0, count, step):
        stop = min(start + step, count)
        influence = factor.rows(start, stop).to(work)
        width = stop - start
        values, errors = solver(columns[start:stop], influence[:, :width], spread[start:stop], quant_type)
        rounded[start:stop] = values
        if stop < count:
            columns[stop:].addmm_(influence[:, width:].T, errors, alpha=-1)
    result = torch.empty_like(rounded)
    result[order] = rounded
    return torch.split(result.T, [len(weight) for weight in weights])


def _choose_scale(
    weight: torch.Tensor,
    quant_type: QuantType,
    granularity: Granularity,
    gram: torch.Tensor,
    options: GptqOptions,
) -> torch.Tensor:
    apart = not quant_type.is_float and granularity != TENSOR
    if options.scale == "absmax" or (options.scale == "auto" and apart):
        return absmax_scale(weight, quant_type, granularity)
    return search_scale(weight, quant_type, granularity, channel_weights=gram.diagonal())


def _keep_better(
    solved: Quantized, loss: torch.Tensor, nearest: Quantized, nearest_loss: torch.Tensor
) -> tuple[Quantized, torch.Tensor]:
    """The better of two solutions: row by row where rows have scales of their own, else as a whole."""
    granularity = solved.granularity
    if granularity.block_rows != 1:
        if float(loss.sum()) <= float(nearest_loss.sum()):
            return solved, loss
        return nearest, nearest_loss
    worse = loss > nearest_loss
    if not bool(worse.any()):
        return solved, loss
    codes, scale = solved.codes.clone(), solved.scale.clone()
    codes.view(torch.uint8)[worse] = nearest.codes.view(torch.uint8)[worse]
    scale[worse] = nearest.scale[worse]
    mixed = Quantized(codes, scale, solved.quant_type, granularity)
    return mixed, torch.where(worse, nearest_loss, loss)
