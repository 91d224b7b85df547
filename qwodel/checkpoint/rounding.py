"""The seam between the engine and the algorithms: how one weight becomes codes and scales.

A rounding is a frozen value, so that it can be printed, compared, kept in a
manifest and sent to a worker process. Data-aware methods are further classes
that satisfy :class:`Rounding`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from qwodel.algorithms.learned_rounding import RoundingOptions
from qwodel.algorithms.quant_types import TENSOR, Granularity, QuantType
from qwodel.algorithms.scales import Quantized, quantize, search_scale
from qwodel.algorithms.weight_rounding import round_weight

__all__ = ["Learned", "Nearest", "Rounding", "ScaleSearch", "default_rounding"]


class Rounding(Protocol):
    """What the engine asks of a rounding method."""

    @property
    def name(self) -> str:
        """The method's name in plans and manifests."""

    def rows_apart(self, granularity: Granularity) -> bool:
        """Whether rows may be rounded in separate pieces that do not cut a block, with the same result."""

    def round(
        self, weight: torch.Tensor, quant_type: QuantType, granularity: Granularity, *, layer: str
    ) -> Quantized:
        """Quantize the finite ``[M, N]`` weight of ``layer`` (its name without ``.weight``)."""


@dataclass(frozen=True, slots=True)
class Nearest:
    """Absmax scales, round to nearest. Works in pieces of rows for every granularity."""

    name: str = field(default="nearest", init=False)

    def rows_apart(self, granularity: Granularity) -> bool:
        return granularity != TENSOR

    def round(
        self, weight: torch.Tensor, quant_type: QuantType, granularity: Granularity, *, layer: str
    ) -> Quantized:
        del layer
        return quantize(weight, quant_type, granularity)


@dataclass(frozen=True, slots=True)
class ScaleSearch:
    """Scales searched for the least squared weight error, round to nearest."""

    name: str = field(default="search", init=False)

    def rows_apart(self, granularity: Granularity) -> bool:
        return granularity != TENSOR

    def round(
        self, weight: torch.Tensor, quant_type: QuantType, granularity: Granularity, *, layer: str
    ) -> Quantized:
        del layer
        return quantize(weight, quant_type, granularity, search_scale(weight, quant_type, granularity))


@dataclass(frozen=True, slots=True)
class Learned:
    """Codes learned from the nearest ones on; needs the whole weight.

    Attributes:
        options: the solver's settings.
    """

    options: RoundingOptions = field(default_factory=RoundingOptions)
    name: str = field(default="learned", init=False)

    def rows_apart(self, granularity: Granularity) -> bool:
        del granularity
        return False

    def round(
        self, weight: torch.Tensor, quant_type: QuantType, granularity: Granularity, *, layer: str
    ) -> Quantized:
        del layer
        return round_weight(weight, quant_type, granularity, self.options).quantized


def default_rounding(quant_type: QuantType | None, granularity: Granularity) -> Rounding:
    """Return what serves best without calibration data and at little cost.

    FP8 scales of rows and blocks gain from a search; a smaller INT8 or
    whole-tensor scale lowers the weights' error but clips the outliers that
    outputs depend on, so those stay at the absolute maximum.
    """
    searched = quant_type is not None and quant_type.is_float and granularity != TENSOR
    return ScaleSearch() if searched else Nearest()
