"""Constants of INT8 weights; the filter registry loads on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qwodel.algorithms.quant_types import INT8

if TYPE_CHECKING:
    from qwodel.checkpoint.families.layer_filters import MODEL_FILTERS

__all__ = ["COMPUTE_DTYPE", "INT8_SYMMETRIC_MAX", "MODEL_FILTERS", "SCALE_DTYPE", "TARGET_INT8_DTYPE"]

TARGET_INT8_DTYPE: torch.dtype = INT8.dtype
"""What codes are stored in."""

COMPUTE_DTYPE: torch.dtype = torch.float32
"""What errors and products are computed in."""

SCALE_DTYPE: torch.dtype = torch.float32
"""What scales are stored in."""

INT8_SYMMETRIC_MAX: int = int(INT8.qmax)
"""The greatest code; the least is its negative."""


def __getattr__(name: str) -> Any:
    if name != "MODEL_FILTERS":
        raise AttributeError(f"module 'qwodel.int8.constants' has no attribute {name!r}")
    from qwodel.checkpoint.families.layer_filters import MODEL_FILTERS

    return MODEL_FILTERS


def __dir__() -> list[str]:
    return sorted(__all__)
