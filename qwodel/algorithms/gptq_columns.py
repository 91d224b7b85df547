"""GPTQ's recursion: columns rounded one after the other, each error spread over those to come.

With UᵀU = H + added on the diagonal, inverted, and e the errors of a row's columns, each divided by
its U_ii, the row's error is e U, so that its loss in the damped norm is Σ eᵢ²: what the damping
added to it is taken off, and the loss under H itself needs no product with H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qwodel.algorithms.gptq_options import GptqOptions
from qwodel.algorithms.grid import round_to_grid
from qwodel.algorithms.inverse_factor import InverseFactor
from qwodel.algorithms.quant_types import Granularity, QuantType
from qwodel.algorithms.scales import Quantized
from qwodel.algorithms.tiles import expand_scale

__all__ = ["BlockSolver", "solve_block", "solve_columns"]

BlockSolver = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, QuantType], tuple[torch.Tensor, torch.Tensor]
]
"""``(columns [b, M], factor [b, b], scales [b, M or 1], type) → (rounded weights, scaled errors)``, both ``[b, M]``."""


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
    rows = zip(columns, scales, rounded, errors, factor.diagonal().tolist(), strict=True)
    for i, (column, scale, value, error, pivot) in enumerate(rows):
        torch.mul(round_to_grid((column / scale).float(), quant_type), scale, out=value)
        torch.sub(column, value, out=error).div_(pivot)
        columns[i + 1 :].sub_(factor[i, i + 1 :, None] * error)
    return rounded, errors


def solve_columns(
    weights: Sequence[torch.Tensor],
    factor: InverseFactor,
    scales: Sequence[torch.Tensor],
    quant_type: QuantType,
    granularity: Granularity,
    options: GptqOptions,
    solver: BlockSolver,
) -> list[tuple[Quantized, torch.Tensor]]:
    """GPTQ's codes of weights with the same inputs, and what they cost.

    Args:
        weights: ``[M_i, N]`` each.
        scales: dequant scales of each weight.

    Returns:
        for each weight its codes and ``e H eᵀ`` of each row of their error, fp64 ``[M_i]``.
    """
    order, count = factor.order, len(factor.order)
    # In fp32 the order of sums turns a code here and there, and those after it.
    work = torch.float64 if order.device.type == "cpu" else torch.float32
    source = torch.cat([weight.T for weight in weights], dim=1)[order]
    columns = source.to(work, copy=True)
    spread = _spread_scales(weights, scales, granularity, work)
    spread = spread[order] if granularity.is_block else spread.expand(count, -1)
    codes = torch.empty(columns.shape, dtype=quant_type.dtype, device=columns.device)
    losses = torch.zeros(columns.shape[1], dtype=torch.float64, device=columns.device)
    step = options.block_size if options.lazy else 1
    for start in range(0, count, step):
        stop = min(start + step, count)
        here, width = slice(start, stop), stop - start
        influence = factor.rows(start, stop).to(work)
        values, errors = solver(columns[here], influence[:, :width], spread[here], quant_type)
        if stop < count:
            columns[stop:].addmm_(influence[:, width:].T, errors, alpha=-1)
        codes.view(torch.uint8)[order[here]] = _codes(values, spread[here], quant_type).view(torch.uint8)
        losses += errors.double().square_().sum(dim=0)
        losses -= factor.added[here] @ values.sub_(source[here]).double().square_()
    sizes = [len(weight) for weight in weights]
    parts = zip(torch.split(codes.T, sizes), scales, torch.split(losses.clamp_(min=0), sizes), strict=True)
    return [
        (Quantized(part.contiguous(), scale, quant_type, granularity), loss) for part, scale, loss in parts
    ]


def _spread_scales(
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    granularity: Granularity,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The scale of each weight, ``[N or 1, M]``."""
    width = weights[0].shape[1] if granularity.is_block else 1
    parts = []
    for weight, scale in zip(weights, scales, strict=True):
        part = expand_scale(scale, granularity, slice(0, len(weight)), weight.shape[1]).to(dtype)
        parts.append(part.reshape(-1, width).expand(len(weight), width))
    return torch.cat(parts).T


def _codes(values: torch.Tensor, scales: torch.Tensor, quant_type: QuantType) -> torch.Tensor:
    """The codes of values that are multiples of their scales."""
    ratio = (values / scales).float()
    # The quotient may miss its integer by an ulp, which a cast would truncate.
    return (ratio if quant_type.is_float else ratio.round_()).to(quant_type.dtype)
