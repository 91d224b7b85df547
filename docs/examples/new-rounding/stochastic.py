"""Stochastic rounding: up or down by chance, right on average. An example of a new rounding method."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qwodel.algorithms.scales import Quantized, absmax_scale
from qwodel.algorithms.tiles import expand_scale
from qwodel.checkpoint.rounding.methods import LayerCodes, LayerWeight, Rounding
from qwodel.checkpoint.rounding.registry import RoundingMethod
from qwodel.exceptions import ConfigurationError


@dataclass(frozen=True, slots=True)
class Stochastic(Rounding):
    """Integer codes, each rounded up with the probability of its fraction."""

    name: str = field(default="stochastic", init=False)

    def round(self, given: LayerWeight) -> LayerCodes:
        if given.quant_type.is_float:
            raise ConfigurationError("stochastic rounding is an example for integers")
        scale = absmax_scale(given.weight, given.quant_type, given.granularity)
        rows = slice(0, given.weight.shape[0])
        steps = given.weight.float() / expand_scale(scale, given.granularity, rows, given.weight.shape[1])
        # A generator of its own: the user's is left alone, and the bytes are the same each time.
        chance = torch.rand(steps.shape, generator=torch.Generator().manual_seed(0))
        codes = (steps + chance).floor_().clamp_(given.quant_type.qmin, given.quant_type.qmax)
        done = Quantized(codes.to(given.quant_type.dtype), scale, given.quant_type, given.granularity)
        return LayerCodes(done)


STOCHASTIC = RoundingMethod("stochastic", "rounds up or down by chance", alone=lambda _: Stochastic())
