"""The INT8 backend."""

from __future__ import annotations

from typing import ClassVar

from qwodel.backends.weight_files import WeightFileQuantizer

__all__ = ["INT8Quantizer"]


class INT8Quantizer(WeightFileQuantizer):
    """INT8 weights in safetensors."""

    name: ClassVar[str] = "int8"
    extra: ClassVar[str] = "int8"
