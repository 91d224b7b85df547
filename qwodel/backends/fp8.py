"""The FP8 backend."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from qwodel.backends.base import FormatSpec
from qwodel.backends.weight_files import WeightFileQuantizer

__all__ = ["FP8Quantizer"]

_FORMATS = (
    FormatSpec(
        "fp8_e4m3",
        "FP8 E4M3, one scale a tensor: the FP8 that ComfyUI, vLLM and transformers all load",
        8.0,
        "ComfyUI, vLLM, transformers",
        aliases=("fp8", "fp8_e4m3fn", "fp8_tensor"),
    ),
    FormatSpec(
        "fp8_e4m3_row",
        "FP8 E4M3, one scale a row: a little more accurate; as a single file NOT loadable by stock ComfyUI",
        8.0,
        "vLLM, transformers",
        aliases=("fp8_row",),
    ),
    FormatSpec(
        "fp8_e4m3_block",
        "FP8 E4M3, one scale a 128×128 block, as DeepSeek; as a single file NOT loadable by stock ComfyUI",
        8.0,
        "vLLM, transformers",
        aliases=("fp8_block",),
    ),
    FormatSpec(
        "fp8_e5m2",
        "FP8 E5M2, one scale a tensor: one bit of mantissa less than E4M3, more range; single file only",
        8.0,
        "ComfyUI",
    ),
)


class FP8Quantizer(WeightFileQuantizer):
    """FP8 weights in safetensors."""

    name: ClassVar[str] = "fp8"
    extra: ClassVar[str] = "fp8"

    @classmethod
    def formats(cls) -> Mapping[str, FormatSpec]:
        return MappingProxyType({spec.name: spec for spec in _FORMATS})
