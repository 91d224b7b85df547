"""A weight matrix to codes, block by block of its segments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwodel.algorithms.gptq import GptqOptions, gptq_together
from qwodel.algorithms.quant_types import ROW, TENSOR, Granularity, QuantType
from qwodel.algorithms.scales import quantize_matrix, search_scale
from qwodel.modules.input_rounding import asymmetric_range
from qwodel.modules.weight_codes import WeightCodes
from qwodel.segquant.seams import WeightCut
from qwodel.segquant.settings import CalibrationSettings, WeightSettings

__all__ = ["round_segments"]

_SMALLEST = 1e-12


def round_segments(
    weight: torch.Tensor,
    settings: WeightSettings,
    calib: CalibrationSettings,
    cut: WeightCut,
    *,
    gram: torch.Tensor | None = None,
    search: bool = False,
    solve: bool = False,
) -> WeightCodes:
    """Codes of a weight ``[M, N]``.

    Args:
        cut: its segments.
        gram: ``[N, N]`` of the inputs it will meet.
        search: look for scales that may clip; else the smallest that do not.
        solve: round by GPTQ; else to nearest.
    """
    kind = settings.type.quant_type
    if kind is None:
        values = weight.clamp(-_limit(settings), _limit(settings)).to(settings.type.float_dtype)
        return WeightCodes.of(values, None, None, (weight.shape[1],))
    if settings.symmetric is False:
        return _asymmetric(weight, kind, settings, cut)
    codes, scales, zero, sizes = [], [], None, list[int]()
    start = 0
    for width in cut.inputs:
        part = slice(start, start + width)
        block = weight[:, part].contiguous()
        metric = None if gram is None else gram[part, part]
        found = _symmetric(block, kind, settings, calib, cut.outputs, metric, search=search, solve=solve)
        codes.append(found[0])
        scales.append(found[1])
        sizes += found[2]
        start += width
    return WeightCodes.of(torch.cat(codes, dim=1), kind, torch.cat(scales, dim=1), tuple(sizes), zero)


def _limit(settings: WeightSettings) -> float:
    assert settings.type.float_dtype is not None
    return float(torch.finfo(settings.type.float_dtype).max)


def _symmetric(
    block: torch.Tensor,
    kind: QuantType,
    settings: WeightSettings,
    calib: CalibrationSettings,
    outputs: Sequence[int],
    gram: torch.Tensor | None,
    *,
    search: bool,
    solve: bool,
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Codes ``[M, N]``, scales ``[M, G]`` and the columns of each group."""
    columns = block.shape[1]
    group = calib.groupsize if 0 < calib.groupsize < columns else 0
    granularity = Granularity.group(group) if group else (TENSOR if settings.axis is None else ROW)
    # Rows with scales of their own need no cut.
    pieces = list(torch.split(block, list(outputs))) if granularity == TENSOR else [block]
    if solve and gram is not None:
        metric = gram.to("cpu") if calib.cpu_storage else gram
        options = _gptq_options(calib, search=search)
        solved = [each.quantized for each in gptq_together(pieces, kind, granularity, metric, options)]
    else:
        weights = None if gram is None else gram.diagonal()
        solved = []
        for piece in pieces:
            scale = search_scale(piece, kind, granularity, channel_weights=weights) if search else None
            solved.append(quantize_matrix(piece, kind, granularity, scale))
    scales = [
        each.scale.reshape(1, 1).expand(len(piece), 1) if granularity == TENSOR else each.scale
        for each, piece in zip(solved, pieces, strict=True)
    ]
    sizes = [min(group, columns - start) for start in range(0, columns, group)] if group else [columns]
    return (
        torch.cat([each.codes for each in solved]).to(block.device),
        torch.cat(scales).to(block.device),
        sizes,
    )


def _gptq_options(calib: CalibrationSettings, *, search: bool) -> GptqOptions:
    return GptqOptions(
        block_size=calib.blocksize,
        damping=calib.percdamp,
        act_order=calib.actorder,
        scale="search" if search else "absmax",
    )


def _asymmetric(
    weight: torch.Tensor, kind: QuantType, settings: WeightSettings, cut: WeightCut
) -> WeightCodes:
    least, most = asymmetric_range(kind)
    codes = torch.empty(weight.shape, dtype=kind.dtype, device=weight.device)
    scales = weight.new_empty(len(weight), len(cut.inputs), dtype=torch.float32)
    zeros = torch.empty_like(scales)
    top = 0
    for height in cut.outputs:
        start = 0
        for index, width in enumerate(cut.inputs):
            rows, columns = slice(top, top + height), slice(start, start + width)
            block = weight[rows, columns].float()
            dims = (0, 1) if settings.axis is None else (1,)
            low, high = block.amin(dim=dims, keepdim=True), block.amax(dim=dims, keepdim=True)
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = ((high - low) / (most - least)).clamp_(min=_SMALLEST)
            zero = (least - low / scale).round()
            codes[rows, columns] = (block / scale).round().add(zero).clamp(least, most).to(kind.dtype)
            scales[rows, index : index + 1] = scale
            zeros[rows, index : index + 1] = zero
            start += width
        top += height
    return WeightCodes.of(codes, kind, scales, cut.inputs, zeros)
