"""The FP8 backend."""

from __future__ import annotations

from typing import ClassVar

from qwodel.backends.weight_files import WeightFileQuantizer

__all__ = ["FP8Quantizer"]


class FP8Quantizer(WeightFileQuantizer):
    """FP8 weights in safetensors."""

    name: ClassVar[str] = "fp8"
    extra: ClassVar[str] = "fp8"
