"""Constants of FP8 weights; the layer-name lists load on first use from the layer filters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qwodel.algorithms.quant_types import FP8_E4M3

if TYPE_CHECKING:
    from qwodel.checkpoint.families.layer_filters import (
        AVOID_KEY_NAMES,
        DISTILL_LAYER_KEYNAMES_LARGE,
        DISTILL_LAYER_KEYNAMES_SMALL,
        HUNYUAN_AVOID_KEY_NAMES,
        NERF_LAYER_KEYNAMES_LARGE,
        NERF_LAYER_KEYNAMES_SMALL,
        QWEN_AVOID_KEY_NAMES,
        QWEN_LAYER_KEYNAMES,
        RADIANCE_LAYER_KEYNAMES,
        T5XXL_REMOVE_KEY_NAMES,
        WAN_LAYER_KEYNAMES,
        ZIMAGE_AVOID_KEY_NAMES,
        ZIMAGE_LAYER_KEYNAMES,
    )

__all__ = [
    "AVOID_KEY_NAMES",
    "COMPUTE_DTYPE",
    "DISTILL_LAYER_KEYNAMES_LARGE",
    "DISTILL_LAYER_KEYNAMES_SMALL",
    "FP8_MAX",
    "FP8_MIN",
    "FP8_MIN_POS",
    "HUNYUAN_AVOID_KEY_NAMES",
    "NERF_LAYER_KEYNAMES_LARGE",
    "NERF_LAYER_KEYNAMES_SMALL",
    "QWEN_AVOID_KEY_NAMES",
    "QWEN_LAYER_KEYNAMES",
    "RADIANCE_LAYER_KEYNAMES",
    "SCALE_DTYPE",
    "T5XXL_REMOVE_KEY_NAMES",
    "TARGET_FP8_DTYPE",
    "WAN_LAYER_KEYNAMES",
    "ZIMAGE_AVOID_KEY_NAMES",
    "ZIMAGE_LAYER_KEYNAMES",
    "get_fp8_constants",
]

TARGET_FP8_DTYPE: torch.dtype = FP8_E4M3.dtype
"""The FP8 format of weights unless another is asked for."""

COMPUTE_DTYPE: torch.dtype = torch.float32
"""What errors and products are computed in."""

SCALE_DTYPE: torch.dtype = torch.float32
"""What scales are stored in."""


def get_fp8_constants(fp8_dtype: torch.dtype) -> tuple[float, float, float]:
    """Least, greatest and smallest positive (subnormal) finite value of an FP8 dtype.

    Raises:
        ValueError: the dtype is not one of torch's FP8 formats.
    """
    if not (fp8_dtype.is_floating_point and fp8_dtype.itemsize == 1 and "float8_e" in str(fp8_dtype)):
        raise ValueError(f"{fp8_dtype} is not an FP8 dtype")
    limits = torch.finfo(fp8_dtype)
    first_code = torch.ones(1, dtype=torch.uint8).view(fp8_dtype)
    return limits.min, limits.max, float(first_code.double())


FP8_MIN, FP8_MAX, FP8_MIN_POS = get_fp8_constants(TARGET_FP8_DTYPE)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qwodel.fp8.constants' has no attribute {name!r}")
    from qwodel.checkpoint.families import layer_filters

    return getattr(layer_filters, name)


def __dir__() -> list[str]:
    return sorted(__all__)
