"""INT8 weights: converters and constants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwodel.int8.constants import COMPUTE_DTYPE, INT8_SYMMETRIC_MAX, SCALE_DTYPE, TARGET_INT8_DTYPE
from qwodel.int8.convert import Int8Conversion, convert_to_int8
from qwodel.int8.learned_rounding import LearnedRoundingConverter

if TYPE_CHECKING:
    from qwodel.checkpoint.layer_filters import MODEL_FILTERS

__all__ = [
    "COMPUTE_DTYPE",
    "INT8_SYMMETRIC_MAX",
    "MODEL_FILTERS",
    "SCALE_DTYPE",
    "TARGET_INT8_DTYPE",
    "Int8Conversion",
    "LearnedRoundingConverter",
    "convert_to_int8",
]


def __getattr__(name: str) -> Any:
    if name != "MODEL_FILTERS":
        raise AttributeError(f"module 'qwodel.int8' has no attribute {name!r}")
    from qwodel.checkpoint.layer_filters import MODEL_FILTERS

    return MODEL_FILTERS


def __dir__() -> list[str]:
    return sorted(__all__)
