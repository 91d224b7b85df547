"""The numbers a quantized type can hold: rounding to them and finding their neighbours, in fp32.

Everything here works on *normalised* values, that is weights divided by their scale.
"""

from __future__ import annotations

import torch

from qwodel.algorithms.quant_types import QuantType

__all__ = ["grid_neighbours", "grid_step", "round_to_grid"]

_EXPONENT_BITS = 0x7F800000  # of an fp32 number


def _binade(x: torch.Tensor, quant_type: QuantType) -> torch.Tensor:
    """The power of two at or below ``|x|``, not below the type's smallest normal number."""
    power = (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    return power.clamp_(min=2.0**quant_type.min_exponent)


def grid_step(x: torch.Tensor, quant_type: QuantType) -> torch.Tensor:
    """Distance between grid points around ``x`` (fp32, within the type's range)."""
    if not quant_type.is_float:
        return torch.ones_like(x)
    return _binade(x, quant_type).mul_(2.0**-quant_type.mantissa_bits)


def round_to_grid(x: torch.Tensor, quant_type: QuantType) -> torch.Tensor:
    """Nearest representable value, ties to even, saturating.

    Args:
        x: finite fp32 values; infinities saturate.

    Returns:
        fp32 values that the type represents exactly, in a new tensor.
    """
    if not quant_type.is_float:
        return x.round().clamp_(quant_type.qmin, quant_type.qmax)
    x = x.clamp(quant_type.qmin, quant_type.qmax)
    # Adding a number whose own ulp is the grid step makes the FPU round for us.
    anchor = _binade(x, quant_type).mul_(1.5 * 2.0 ** (23 - quant_type.mantissa_bits))
    return x.add_(anchor).sub_(anchor)


def grid_neighbours(x: torch.Tensor, quant_type: QuantType) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest grid point ≤ x and the least ≥ x; equal where x is on the grid or saturates."""
    x = x.clamp(quant_type.qmin, quant_type.qmax)
    step = grid_step(x, quant_type)
    ratio = x.div_(step)
    return ratio.floor().mul_(step), ratio.ceil().mul_(step)
