"""Corrections of a quantized denoiser's output, learned for each timestep."""

from qwodel.segquant.affiner.attach import AffinerProtocol, attach_affiner
from qwodel.segquant.affiner.base import Affiner
from qwodel.segquant.affiner.kinds import BlockwiseAffiner, PTQDAffiner, TACAffiner
from qwodel.segquant.affiner.learning import load_affiner

__all__ = [
    "Affiner",
    "AffinerProtocol",
    "BlockwiseAffiner",
    "PTQDAffiner",
    "TACAffiner",
    "attach_affiner",
    "load_affiner",
]
