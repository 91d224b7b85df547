"""SegQuant: diffusion models quantized along the seams of their graph, https://arxiv.org/abs/2507.14811."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwodel.modeling.patterns import SegPattern
    from qwodel.segquant.affiner import (
        Affiner,
        AffinerProtocol,
        BlockwiseAffiner,
        PTQDAffiner,
        TACAffiner,
        attach_affiner,
        load_affiner,
    )
    from qwodel.segquant.calibration_set import BaseCalibSet, load_calibrate_set
    from qwodel.segquant.config import default_quantize_config
    from qwodel.segquant.quantization import quantize, quantize_model
    from qwodel.segquant.recording import generate_calibrate_set
    from qwodel.segquant.report import LayerReport, QuantizationReport
    from qwodel.segquant.samplers import AllSampler, NormalSampler, Sampler, TimestepSampler, UniformSampler
    from qwodel.segquant.settings import Calibrate, DType, Optimum
    from qwodel.segquant.storage import load_quantized, save_quantized

__all__ = [
    "Affiner",
    "AffinerProtocol",
    "AllSampler",
    "BaseCalibSet",
    "BlockwiseAffiner",
    "Calibrate",
    "DType",
    "LayerReport",
    "NormalSampler",
    "Optimum",
    "PTQDAffiner",
    "QuantizationReport",
    "Sampler",
    "SegPattern",
    "TACAffiner",
    "TimestepSampler",
    "UniformSampler",
    "attach_affiner",
    "default_quantize_config",
    "generate_calibrate_set",
    "load_affiner",
    "load_calibrate_set",
    "load_quantized",
    "quantize",
    "quantize_model",
    "save_quantized",
]

_MEMBERS = {
    "modeling.patterns": ("SegPattern",),
    "segquant.affiner": (
        "Affiner",
        "AffinerProtocol",
        "BlockwiseAffiner",
        "PTQDAffiner",
        "TACAffiner",
        "attach_affiner",
        "load_affiner",
    ),
    "segquant.calibration_set": ("BaseCalibSet", "load_calibrate_set"),
    "segquant.config": ("default_quantize_config",),
    "segquant.quantization": ("quantize", "quantize_model"),
    "segquant.recording": ("generate_calibrate_set",),
    "segquant.report": ("LayerReport", "QuantizationReport"),
    "segquant.samplers": ("AllSampler", "NormalSampler", "Sampler", "TimestepSampler", "UniformSampler"),
    "segquant.settings": ("Calibrate", "DType", "Optimum"),
    "segquant.storage": ("load_quantized", "save_quantized"),
}
_HOME = {name: home for home, names in _MEMBERS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qwodel.segquant' has no attribute {name!r}")
    return getattr(import_module(f"qwodel.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
