"""INT8 weights: converters and constants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwodel.int8.constants import COMPUTE_DTYPE, INT8_SYMMETRIC_MAX, SCALE_DTYPE, TARGET_INT8_DTYPE
from qwodel.int8.convert import Int8Conversion, convert_to_int8, plan_int8
from qwodel.int8.gptq import GPTQInt8Converter
from qwodel.int8.learned_rounding import LearnedRoundingConverter
from qwodel.int8.quip import QuIPInt8Converter
from qwodel.int8.verbosity import setup_logging

if TYPE_CHECKING:
    from qwodel.checkpoint.families.layer_filters import MODEL_FILTERS
    from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
    from qwodel.checkpoint.lora.merge import (
        load_lora_for_merging,
        load_lora_tensors,
        merge_lora_into_weight,
        merge_multiple_loras,
    )
    from qwodel.checkpoint.plan.layer_config import load_layer_config
    from qwodel.checkpoint.source.weights import read_weights
    from qwodel.evaluation.quality import QualityReporter

__all__ = [
    "COMPUTE_DTYPE",
    "INT8_SYMMETRIC_MAX",
    "MODEL_FILTERS",
    "SCALE_DTYPE",
    "TARGET_INT8_DTYPE",
    "GPTQInt8Converter",
    "Int8Conversion",
    "LearnedRoundingConverter",
    "QuIPInt8Converter",
    "QualityReporter",
    "UnifiedSafetensorsLoader",
    "convert_to_int8",
    "load_layer_config",
    "load_lora_for_merging",
    "load_lora_tensors",
    "merge_lora_into_weight",
    "merge_multiple_loras",
    "plan_int8",
    "read_weights",
    "setup_logging",
]

_HOME = {
    "MODEL_FILTERS": "qwodel.checkpoint.families.layer_filters",
    "QualityReporter": "qwodel.evaluation.quality",
    "UnifiedSafetensorsLoader": "qwodel.checkpoint.files.reader",
    "load_layer_config": "qwodel.checkpoint.plan.layer_config",
    "load_lora_for_merging": "qwodel.checkpoint.lora.merge",
    "load_lora_tensors": "qwodel.checkpoint.lora.merge",
    "merge_lora_into_weight": "qwodel.checkpoint.lora.merge",
    "merge_multiple_loras": "qwodel.checkpoint.lora.merge",
    "read_weights": "qwodel.checkpoint.source.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qwodel.int8' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
