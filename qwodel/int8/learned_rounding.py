"""Learned rounding to INT8."""

from __future__ import annotations

from typing import Any

import torch

from qwodel.algorithms.converter_options import rounding_options
from qwodel.algorithms.quant_types import INT8, ROW, TENSOR, Granularity
from qwodel.algorithms.weight_rounding import round_weight
from qwodel.devices import resolve_device
from qwodel.exceptions import ConfigurationError, did_you_mean

__all__ = ["LearnedRoundingConverter"]

_MODES = ("tensor", "row", "block", "group")


class LearnedRoundingConverter:
    """Quantizes weight matrices to symmetric INT8 with learned rounding.

    Args:
        block_size: side of a block (``"block"``) or length of a group (``"group"``); the
            last ones may be smaller.
        num_iter: the most iterations a matrix; fewer when nothing more is to be had.
        lr: the first learning rate (``ppsf`` finds its own).
        optimizer: ``"original"``, ``"adamw"``, ``"radam"`` or ``"ppsf"`` (needs ProdigyPlus).
        lr_schedule: ``"adaptive"``, ``"plateau"`` or ``"exponential"``.
        top_p: share of the singular values that the objective looks at, in (0, 1].
        min_k, max_k: least and greatest number of singular vectors.
        scaling_mode: ``"tensor"`` one scale, ``"row"`` one a row, ``"block"`` one for each
            square of ``block_size``, ``"group"`` one for ``block_size`` weights of a row.
        full_matrix: full SVD instead of a randomized one.
        **kwargs: ``device`` (where to compute, such as ``"cuda"`` or ``"auto"``; results come back to
            the weight) and further fields of :class:`~qwodel.algorithms.learned_rounding.RoundingOptions`
            and :class:`~qwodel.algorithms.schedules.ScheduleOptions`.

    Raises:
        ConfigurationError: an argument is unknown or has a bad value.
        DependencyError: ``ppsf`` without its package.
    """

    def __init__(
        self,
        block_size: int = 128,
        num_iter: int = 1000,
        lr: float = 0.008,
        optimizer: str = "original",
        lr_schedule: str = "adaptive",
        top_p: float = 0.2,
        min_k: int = 64,
        max_k: int = 1024,
        scaling_mode: str = "row",
        full_matrix: bool = False,
        **kwargs: Any,
    ) -> None:
        if scaling_mode not in _MODES:
            raise ConfigurationError(
                f"INT8 has no scaling mode {scaling_mode!r}; there are {', '.join(_MODES)}",
                hint=did_you_mean(str(scaling_mode), _MODES),
            )
        self.scaling_mode = scaling_mode
        self.granularity = {
            "tensor": TENSOR,
            "row": ROW,
            "block": Granularity.block(block_size),
            "group": Granularity.group(block_size),
        }[scaling_mode]
        settings = {
            "num_iter": num_iter,
            "lr": lr,
            "lr_schedule": lr_schedule,
            "top_p": top_p,
            "min_k": min_k,
            "max_k": max_k,
            "full_matrix": full_matrix,
        }
        device = kwargs.pop("device", None)
        self.options = rounding_options(optimizer, settings | kwargs)
        self.device = None if device is None else resolve_device(device)

    def convert(
        self,
        weight: torch.Tensor,
        activation_scales: torch.Tensor | None = None,
        gram: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize one weight.

        Args:
            weight: ``[M, N]``, bf16, fp16, fp32 or fp64.
            activation_scales: ``[N]`` magnitudes of the layer's real inputs; the scale is then
                chosen for the output error they predict.
            gram: ``[N, N]`` XᵀX of real inputs; scale and rounding then minimise the output error.

        Returns:
            int8 codes ``[M, N]``; fp32 dequant scale, ``()`` for tensor, ``(M, 1)`` for row,
            ``(⌈M/bs⌉, ⌈N/bs⌉)`` for block and ``(M, ⌈N/bs⌉)`` for group; the fp32 weights they stand for.

        Raises:
            ValidationError: not a floating-point matrix, NaN or Inf in it, or statistics that do not fit.
            ConfigurationError: both kinds of statistics at once.
        """
        there = self.device or weight.device
        rounded = round_weight(
            weight.to(there),
            INT8,
            self.granularity,
            self.options,
            activation_scales=None if activation_scales is None else activation_scales.to(there),
            gram=None if gram is None else gram.to(there),
        ).quantized
        back = weight.device
        return rounded.codes.to(back), rounded.scale.to(back), rounded.dequantize().to(back)
