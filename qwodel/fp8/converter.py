"""Learned rounding to FP8."""

from __future__ import annotations

from typing import Any

import torch

from qwodel.algorithms.converter_options import rounding_options
from qwodel.algorithms.quant_types import ROW, TENSOR, Granularity, quant_type
from qwodel.algorithms.weight_rounding import round_weight
from qwodel.devices import resolve_device
from qwodel.exceptions import ConfigurationError, did_you_mean

__all__ = ["LearnedRoundingConverter"]

_MODES = ("tensor", "row", "block")


class LearnedRoundingConverter:
    """Quantizes weight matrices to FP8 with learned rounding.

    Args:
        optimizer: ``"original"``, ``"adamw"``, ``"radam"`` or ``"ppsf"`` (needs ProdigyPlus).
        num_iter: the most iterations a matrix; fewer when nothing more is to be had.
        top_p: share of the singular values that the objective looks at, in (0, 1].
        min_k, max_k: least and greatest number of singular vectors.
        scaling_mode: ``"tensor"`` one scale, ``"row"`` one a row, ``"block"`` one for
            ``block_size`` neighbouring weights of a row. Row and block scales are searched.
        block_size: weights in a block (mode ``"block"`` only); the last may be shorter.
        full_matrix: full SVD instead of a randomized one.
        **kwargs: ``device`` (where to compute, such as ``"cuda"`` or ``"auto"``; results come back to
            the weight), ``target_dtype`` (``torch.float8_e4m3fn`` or ``torch.float8_e5m2``) and the
            fields of :class:`~qwodel.algorithms.learned_rounding.RoundingOptions` and
            :class:`~qwodel.algorithms.schedules.ScheduleOptions`, such as ``lr=0.01``.

    Raises:
        ConfigurationError: an argument is unknown or has a bad value.
        DependencyError: ``ppsf`` without its package.
    """

    def __init__(
        self,
        optimizer: str = "original",
        num_iter: int = 500,
        top_p: float = 0.01,
        min_k: int = 1,
        max_k: int = 16,
        scaling_mode: str = "tensor",
        block_size: int = 64,
        full_matrix: bool = False,
        **kwargs: Any,
    ) -> None:
        if scaling_mode not in _MODES:
            raise ConfigurationError(
                f"FP8 has no scaling mode {scaling_mode!r}; there are {', '.join(_MODES)}",
                hint=did_you_mean(str(scaling_mode), _MODES),
            )
        self.quant_type = quant_type(kwargs.pop("target_dtype", torch.float8_e4m3fn))
        if not self.quant_type.is_float:
            raise ConfigurationError(f"target_dtype must be an FP8 dtype, not {self.quant_type.dtype}")
        self.scaling_mode = scaling_mode
        group = Granularity.group(block_size)
        self.granularity = {"tensor": TENSOR, "row": ROW, "block": group}[scaling_mode]
        settings = {
            "num_iter": num_iter,
            "top_p": top_p,
            "min_k": min_k,
            "max_k": max_k,
            "full_matrix": full_matrix,
        }
        device = kwargs.pop("device", None)
        self.device = None if device is None else resolve_device(device)
        self.options = rounding_options(optimizer, settings | kwargs)

    def convert(
        self,
        W_orig: torch.Tensor,
        activation_scales: torch.Tensor | None = None,
        gram: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize one weight.

        Args:
            W_orig: ``[M, N]``, bf16, fp16, fp32 or fp64.
            activation_scales: ``[N]`` magnitudes of the layer's real inputs; the scale is then
                chosen for the output error they predict.
            gram: ``[N, N]`` XᵀX of real inputs; scale and rounding then minimise the output error.

        Returns:
            FP8 codes ``[M, N]``; fp32 dequant scale, ``(1,)`` for tensor, ``(M, 1)`` for row and
            ``(M, num_blocks, 1)`` for block scaling; the fp32 weights they stand for.

        Raises:
            ValidationError: not a floating-point matrix, NaN or Inf in it, or statistics that do not fit.
            ConfigurationError: both kinds of statistics at once.
        """
        back, there = W_orig.device, self.device or W_orig.device
        rounded = round_weight(
            W_orig.to(there),
            self.quant_type,
            self.granularity,
            self.options,
            activation_scales=None if activation_scales is None else activation_scales.to(there),
            gram=None if gram is None else gram.to(there),
        ).quantized
        shape = {"tensor": (1,), "row": rounded.scale.shape, "block": (*rounded.scale.shape, 1)}[
            self.scaling_mode
        ]
        return rounded.codes.to(back), rounded.scale.reshape(shape).to(back), rounded.dequantize().to(back)
