"""Codes and scales: quantize a matrix to the nearest codes, and turn codes back into weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwodel.algorithms.fp8_decode import codes_to_float
from qwodel.algorithms.quant_types import Granularity, QuantType
from qwodel.algorithms.scale_choice import absmax_scale, normalise, search_scale
from qwodel.algorithms.tiles import check_finite, check_matrix, expand_scale, row_chunks
from qwodel.exceptions import ValidationError

__all__ = ["Quantized", "absmax_scale", "dequantize", "nearest_codes", "quantize_matrix", "search_scale"]


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A quantized matrix: ``weight ≈ codes · scale``.

    Attributes:
        codes: ``[M, N]`` of ``quant_type.dtype``.
        scale: fp32 dequant scale of shape ``granularity.scale_shape((M, N))``.
        quant_type: what a code is.
        granularity: which codes share a scale.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    quant_type: QuantType
    granularity: Granularity

    def __post_init__(self) -> None:
        if self.codes.dtype != self.quant_type.dtype:
            raise ValidationError(
                f"{self.quant_type} codes are {self.quant_type.dtype}, not {self.codes.dtype}"
            )
        check_scale(self.scale, self.granularity, self.codes.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights the codes stand for, ``[M, N]``; the product is formed in fp32 (fp64 for fp64)."""
        return dequantize(self.codes, self.scale, self.granularity, dtype)


def check_scale(scale: torch.Tensor, granularity: Granularity, weight_shape: torch.Size) -> None:
    """Refuse a scale of the wrong shape or with values that cannot be one.

    Raises:
        ValidationError: the shape does not fit, or a scale is not positive and finite.
    """
    shape = granularity.scale_shape(weight_shape)
    if scale.shape != shape:
        raise ValidationError(
            f"a scale of shape {list(scale.shape)} does not fit a weight of {list(weight_shape)}: "
            f"granularity {granularity} needs {list(shape)}"
        )
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValidationError("a dequant scale must be positive and finite")


def quantize_matrix(
    weight: torch.Tensor, quant_type: QuantType, granularity: Granularity, scale: torch.Tensor | None = None
) -> Quantized:
    """Round a matrix to the nearest codes, ties to even, saturating at ``qmin`` and ``qmax``.

    Works chunk by chunk: beyond the result, memory is a few megabytes. The result has the
    same bits whatever the number of threads.

    Args:
        weight: ``[M, N]``, bf16, fp16, fp32 or fp64.
        scale: fp32 dequant scale to use; without one, :func:`absmax_scale`.

    Raises:
        ValidationError: not a floating-point matrix, NaN or Inf in it, or a scale that does not fit.
    """
    check_matrix(weight)
    if scale is None:
        scale = absmax_scale(weight, quant_type, granularity)
        return Quantized(
            nearest_codes(weight, scale, quant_type, granularity), scale, quant_type, granularity
        )
    scale = scale.to(device=weight.device, dtype=torch.float32)
    check_scale(scale, granularity, weight.shape)
    codes = torch.empty(weight.shape, dtype=quant_type.dtype, device=weight.device)
    for rows in row_chunks(weight.shape, granularity):
        x = normalise(weight, scale, granularity, rows)
        # A sum that is finite has finite terms; one that is not may have overflowed.
        if not bool(x.sum().isfinite()):
            check_finite(weight)
        codes[rows] = _rounded(x, quant_type).clamp_(quant_type.qmin, quant_type.qmax)
    return Quantized(codes, scale, quant_type, granularity)


def nearest_codes(
    weight: torch.Tensor, scale: torch.Tensor, quant_type: QuantType, granularity: Granularity
) -> torch.Tensor:
    """The codes of :func:`quantize_matrix` for the scale that :func:`absmax_scale` finds for this weight, or for one it is part of.

    Such a scale is not found for NaN and Inf and lets nothing saturate, so neither is looked for again.
    """
    codes = torch.empty(weight.shape, dtype=quant_type.dtype, device=weight.device)
    for rows in row_chunks(weight.shape, granularity):
        codes[rows] = _rounded(normalise(weight, scale, granularity, rows), quant_type)
    return codes


def _rounded(x: torch.Tensor, quant_type: QuantType) -> torch.Tensor:
    """``x`` as it is cast to codes: to an integer that truncates, to FP8 it rounds to even by itself."""
    return x if quant_type.is_float else x.round_()


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, granularity: Granularity, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``codes · scale`` as a new ``[M, N]`` tensor of ``dtype``.

    Raises:
        ValidationError: the scale's shape does not fit the codes.
    """
    check_scale(scale, granularity, codes.shape)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows in row_chunks(codes.shape, granularity):
        spread = expand_scale(scale, granularity, rows, codes.shape[1])
        out[rows] = codes_to_float(codes[rows]).to(work) * spread.to(work)
    return out
