"""The INT8 backend."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from qwodel.backends.base import FormatSpec
from qwodel.backends.weight_files import WeightFileQuantizer

__all__ = ["INT8Quantizer"]

_FORMATS = (
    FormatSpec(
        "int8_row",
        "INT8, one scale a row: the accurate INT8 that ComfyUI, vLLM and transformers all load",
        8.0,
        "ComfyUI, vLLM, transformers",
        aliases=("int8", "w8a8"),
    ),
    FormatSpec(
        "int8_convrot",
        "INT8 rows of rotated columns: the most accurate INT8 for ComfyUI, whose activations are INT8 too",
        8.0,
        "ComfyUI",
        aliases=("convrot",),
    ),
    FormatSpec(
        "int8_quip",
        "INT8 in a basis rotated on both sides: the least weight error; NOT loadable by ComfyUI or vLLM, "
        "only qwodel.int8.read_weights decodes it",
        8.0,
        "qwodel",
    ),
    FormatSpec(
        "int8_tensor",
        "INT8, one scale a tensor: less accurate than row scales",
        8.0,
        "ComfyUI, vLLM, transformers",
    ),
    FormatSpec(
        "int8_block",
        "INT8, one scale a 128×128 block: NOT loadable by stock ComfyUI or vLLM",
        8.0,
        "transformers, ComfyUI-QuantOps",
    ),
    FormatSpec("fp16", "every weight cast to FP16, nothing quantized", 16.0, "ComfyUI, vLLM, transformers"),
)


class INT8Quantizer(WeightFileQuantizer):
    """INT8 weights in safetensors."""

    name: ClassVar[str] = "int8"
    extra: ClassVar[str] = "int8"

    @classmethod
    def formats(cls) -> Mapping[str, FormatSpec]:
        return MappingProxyType({spec.name: spec for spec in _FORMATS})
