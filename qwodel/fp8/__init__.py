"""FP8 weights by learned rounding: every public name, flat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwodel.fp8.constants import (
    COMPUTE_DTYPE,
    FP8_MAX,
    FP8_MIN,
    FP8_MIN_POS,
    SCALE_DTYPE,
    TARGET_FP8_DTYPE,
    get_fp8_constants,
)
from qwodel.fp8.converter import LearnedRoundingConverter
from qwodel.fp8.optimizers import get_optimizer
from qwodel.fp8.runtime import clean_gpu_memory, generate_output_filename, get_device, setup_seed

if TYPE_CHECKING:
    from qwodel.checkpoint.families.layer_filters import should_process_layer

__all__ = [
    "COMPUTE_DTYPE",
    "FP8_MAX",
    "FP8_MIN",
    "FP8_MIN_POS",
    "SCALE_DTYPE",
    "TARGET_FP8_DTYPE",
    "LearnedRoundingConverter",
    "clean_gpu_memory",
    "generate_output_filename",
    "get_device",
    "get_fp8_constants",
    "get_optimizer",
    "setup_seed",
    "should_process_layer",
]


def __getattr__(name: str) -> Any:
    if name != "should_process_layer":
        raise AttributeError(f"module 'qwodel.fp8' has no attribute {name!r}")
    from qwodel.checkpoint.families.layer_filters import should_process_layer

    return should_process_layer


def __dir__() -> list[str]:
    return sorted(__all__)
