"""Rounding weights with what is known of their inputs: one entry for every data-aware method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from qwodel.algorithms.asymmetric import asymmetric_targets
from qwodel.algorithms.gptq import BlockSolver, GptqOptions, GptqResult, gptq_together, output_error
from qwodel.algorithms.gram import InputStatistics
from qwodel.algorithms.hadamard import Basis
from qwodel.algorithms.learned_rounding import RoundingOptions
from qwodel.algorithms.quant_types import TENSOR, Granularity, QuantType
from qwodel.algorithms.scale_choice import check_gram
from qwodel.algorithms.scales import Quantized, quantize_matrix, search_scale
from qwodel.algorithms.weight_rounding import round_weight
from qwodel.report import decibels

__all__ = [
    "DataAware",
    "RoundedWeight",
    "RoundingReport",
    "round_together",
    "round_without_data",
    "searches_scale",
]

Method = Literal["gptq", "gptaq", "quip", "learned"]


@dataclass(frozen=True, slots=True)
class DataAware:
    """A data-aware method and its settings.

    Attributes:
        method: ``gptq``; ``gptaq``, which also makes up for what earlier layers have done to the inputs,
            as far as the statistics tell of it; ``quip`` (LDLQ, the same recursion, for readers that know no rotation); or
            ``learned``, gradient-based rounding under the Gram matrix.
        gptq: settings of GPTQ and LDLQ.
        learned: settings of learned rounding.
        min_tokens: fewer inputs than this share of the input channels say too little: such layers
            are rounded without data.
    """

    method: Method = "gptq"
    gptq: GptqOptions = field(default_factory=GptqOptions)
    learned: RoundingOptions = field(default_factory=RoundingOptions)
    min_tokens: float = 0.25


@dataclass(frozen=True, slots=True)
class RoundingReport:
    """How a layer's codes were found.

    Attributes:
        method: what chose them.
        tokens: inputs its statistics come from.
        output_sqnr_db: 10·log₁₀(‖XWᵀ‖²/‖X(W−Ŵ)ᵀ‖²) on the calibration data; ``None`` without data. Of
            gptaq, W is the weight that makes up for earlier layers.
        nearest_sqnr_db: the same of round-to-nearest with absmax scales, in the same basis.
        damping: λ that GPTQ used, as a share of the Gram matrix's mean diagonal.
        note: why the method was not used, where it was not.
    """

    method: str
    tokens: int = 0
    output_sqnr_db: float | None = None
    nearest_sqnr_db: float | None = None
    damping: float | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RoundedWeight:
    """Codes (of the rotated weight, where it is rotated), the weight they stand for, and a report.

    Attributes:
        codes: codes and scales.
        weight: fp32 ``[M, N]``, in the original basis.
    """

    codes: Quantized
    weight: torch.Tensor
    report: RoundingReport


def round_together(
    weights: Sequence[torch.Tensor],
    quant_type: QuantType,
    granularity: Granularity,
    statistics: InputStatistics | None,
    options: DataAware,
    *,
    bases: Sequence[Basis] | None = None,
    solver: BlockSolver | None = None,
) -> list[RoundedWeight]:
    """Round weights that read the same inputs.

    Args:
        weights: ``[M_i, N]`` each.
        statistics: of those inputs; ``None`` rounds without data.
        bases: of the codes of each weight; all must change the inputs alike.
        solver: GPTQ's inner loop.

    Raises:
        ValidationError: no floating-point matrix, NaN or Inf, or statistics that do not fit.
    """
    columns = weights[0].shape[1]
    note = _too_little(statistics, columns, options)
    turned = list(weights)
    if options.method == "gptaq" and statistics is not None and not note:
        turned = asymmetric_targets(weights, statistics)
    if bases is not None:
        turned = [basis.apply(weight) for basis, weight in zip(bases, turned, strict=True)]
    if statistics is None or statistics.gram is None or note:
        rounded = [
            RoundedWeight(codes, codes.dequantize(), RoundingReport("nearest", note=note))
            for codes in (round_without_data(weight, quant_type, granularity) for weight in turned)
        ]
    else:
        gram = statistics.gram if bases is None else bases[0].gram(statistics.gram)
        if options.method == "learned":
            rounded = [_learned(weight, quant_type, granularity, gram, options) for weight in turned]
        else:
            results = gptq_together(turned, quant_type, granularity, gram, options.gptq, solver=solver)
            rounded = [_reported(result, options.method) for result in results]
        rounded = [replace(each, report=replace(each.report, tokens=statistics.count)) for each in rounded]
    if bases is None:
        return rounded
    return [
        replace(each, weight=basis.restore(each.weight)) for basis, each in zip(bases, rounded, strict=True)
    ]


def round_without_data(weight: torch.Tensor, quant_type: QuantType, granularity: Granularity) -> Quantized:
    """The best without data: searched scales for FP8 rows and blocks, absmax scales elsewhere."""
    searched = searches_scale(quant_type, granularity)
    scale = search_scale(weight, quant_type, granularity) if searched else None
    return quantize_matrix(weight, quant_type, granularity, scale)


def searches_scale(quant_type: QuantType, granularity: Granularity) -> bool:
    """Whether a search of scales helps where nothing is known of the inputs.

    A smaller INT8 or whole-tensor scale lowers the weights' error, but clips the outliers that
    outputs depend on.
    """
    return quant_type.is_float and granularity != TENSOR and not quant_type.power_of_two_scales


def _too_little(statistics: InputStatistics | None, columns: int, options: DataAware) -> str | None:
    if statistics is None:
        return "its layer saw no calibration data"
    if statistics.gram is None:
        return "its statistics hold no Gram matrix"
    if statistics.count < options.min_tokens * columns:
        return f"its layer saw {statistics.count} tokens, too few for {columns} input channels"
    return None


def _reported(result: GptqResult, method: str) -> RoundedWeight:
    signal = float(result.signal.sum())
    report = RoundingReport(
        "nearest" if result.fell_back else method,
        output_sqnr_db=_decibels(signal, float(result.loss.sum())),
        nearest_sqnr_db=_decibels(signal, float(result.nearest_loss.sum())),
        damping=result.damping,
        note=result.fell_back,
    )
    return RoundedWeight(result.quantized, result.quantized.dequantize(), report)


def _learned(
    weight: torch.Tensor,
    quant_type: QuantType,
    granularity: Granularity,
    gram: torch.Tensor,
    options: DataAware,
) -> RoundedWeight:
    codes = round_weight(weight, quant_type, granularity, options.learned, gram=gram).quantized
    done, metric = codes.dequantize(), check_gram(gram, weight.shape[1])
    nearest = quantize_matrix(weight, quant_type, granularity).dequantize()
    signal = float(output_error(weight.float(), metric).sum())
    report = RoundingReport(
        options.learned.optimizer,
        output_sqnr_db=_decibels(signal, float(output_error(done - weight, metric).sum())),
        nearest_sqnr_db=_decibels(signal, float(output_error(nearest - weight, metric).sum())),
    )
    return RoundedWeight(codes, done, report)


def _decibels(signal: float, noise: float) -> float | None:
    ratio = decibels(signal, noise) if signal > 0 else -math.inf
    return ratio if math.isfinite(ratio) else None
