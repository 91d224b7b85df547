"""GPTQ: rounding column by column, each column's error made good by those still to come.

Frantar et al., https://arxiv.org/abs/2210.17323. With H = XᵀX of the layer's real inputs and
UᵀU = (H + λI)⁻¹, U upper triangular, the error of column i divided by U_ii is spread over the
columns behind it along row i of U. The objective is tr(E H Eᵀ) = ‖X Eᵀ‖², the output error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qwodel.algorithms.gptq_columns import BlockSolver, solve_block, solve_columns
from qwodel.algorithms.gptq_options import DEFAULT_DAMPING, GptqOptions
from qwodel.algorithms.inverse_factor import InverseFactor, factorize
from qwodel.algorithms.quant_types import TENSOR, Granularity, QuantType
from qwodel.algorithms.scale_choice import absmax_scale, check_gram, search_scale
from qwodel.algorithms.scales import Quantized, quantize_matrix
from qwodel.algorithms.tiles import check_matrix

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

_STRIP = 128
"""Columns of a Gram matrix at a time: of its two equal triangles only one is multiplied."""


@dataclass(frozen=True, slots=True)
class GptqResult:
    """A solved matrix.

    Attributes:
        quantized: codes and scales.
        loss: ‖X Eᵀ‖² of each row, fp64 ``[M]``, for a Gram matrix with mean diagonal 1; summed by the
            recursion, to 1e-9 where it runs in fp64.
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
    found = solve_columns(weights, factor, scales, quant_type, granularity, options, solver or solve_block)
    results = []
    for start, (solved, loss) in zip(starts, found, strict=True):
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
    nearest = quantize_matrix(weight, quant_type, granularity)
    loss = output_error(nearest.dequantize() - weight, gram)
    signal = output_error(weight if weight.dtype == torch.float64 else weight.float(), gram)
    return GptqResult(nearest, loss, loss, signal, options.damping)


def output_error(error: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """``e H eᵀ`` of each row e of ``error`` ``[M, N]``, for a symmetric H; fp64 ``[M]``."""
    error = error.to(gram.device)
    gram = gram.to(error.dtype)
    total = torch.zeros(len(error), dtype=torch.float64, device=error.device)
    for start in range(0, error.shape[1], _STRIP):
        stop = start + _STRIP
        strip = error[:, start:stop]
        product = strip @ gram[start:stop, start:stop]
        product.addmm_(error[:, :start], gram[:start, start:stop], alpha=2)
        total += (product.double() * strip).sum(dim=1)
    return total.clamp_(min=0)


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
    worse = ~(loss <= nearest_loss)  # as what is not a number is
    if not bool(worse.any()):
        return solved, loss
    codes, scale = solved.codes.clone(), solved.scale.clone()
    codes.view(torch.uint8)[worse] = nearest.codes.view(torch.uint8)[worse]
    scale[worse] = nearest.scale[worse]
    mixed = Quantized(codes, scale, solved.quant_type, granularity)
    return mixed, torch.where(worse, nearest_loss, loss)
