"""SegQuant: diffusion models quantized along the seams of their graph.

Names are imported on first use.
"""

from __future__ import annotations

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
    from qwodel.segquant.recording import generate_calibrate_set
    from qwodel.segquant.samplers import AllSampler, NormalSampler, Sampler, TimestepSampler, UniformSampler

__all__ = [
    "Affiner",
    "AffinerProtocol",
    "AllSampler",
    "BaseCalibSet",
    "BlockwiseAffiner",
    "NormalSampler",
    "PTQDAffiner",
    "Sampler",
    "SegPattern",
    "TACAffiner",
    "TimestepSampler",
    "UniformSampler",
    "attach_affiner",
    "generate_calibrate_set",
    "load_affiner",
    "load_calibrate_set",
]

_AFFINERS = (
    "Affiner",
    "AffinerProtocol",
    "BlockwiseAffiner",
    "PTQDAffiner",
    "TACAffiner",
    "attach_affiner",
    "load_affiner",
)
_HOME = {
    **dict.fromkeys(_AFFINERS, "qwodel.segquant.affiner"),
    "AllSampler": "qwodel.segquant.samplers",
    "BaseCalibSet": "qwodel.segquant.calibration_set",
    "NormalSampler": "qwodel.segquant.samplers",
    "Sampler": "qwodel.segquant.samplers",
    "SegPattern": "qwodel.modeling.patterns",
    "TimestepSampler": "qwodel.segquant.samplers",
    "UniformSampler": "qwodel.segquant.samplers",
    "generate_calibrate_set": "qwodel.segquant.recording",
    "load_calibrate_set": "qwodel.segquant.calibration_set",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qwodel.segquant' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
