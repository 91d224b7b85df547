"""SegQuant: diffusion models quantized along the seams of their graph.

https://arxiv.org/abs/2507.14811.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwodel.modeling.patterns import SegPattern
    from qwodel.segquant.config import Calibrate, DType, Optimum, default_quantize_config
    from qwodel.segquant.quantize import LayerReport, QuantizationReport, quantize, quantize_model
    from qwodel.segquant.storage import load_quantized, save_quantized

__all__ = [
    "Calibrate",
    "DType",
    "LayerReport",
    "Optimum",
    "QuantizationReport",
    "SegPattern",
    "default_quantize_config",
    "load_quantized",
    "quantize",
    "quantize_model",
    "save_quantized",
]

_HOME = {
    **dict.fromkeys(("Calibrate", "DType", "Optimum", "default_quantize_config"), "segquant.config"),
    **dict.fromkeys(("LayerReport", "QuantizationReport", "quantize_model"), "segquant.quantize"),
    **dict.fromkeys(("load_quantized", "save_quantized"), "segquant.storage"),
    "SegPattern": "modeling.patterns",
    "quantize": "segquant.quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qwodel.segquant' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"qwodel.{_HOME[name]}"), name)
    # The import has bound the submodule's name, which for some is also the function's.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
