"""FP8 codes as fp32, with the integer operations that CPUs do in bulk.

torch converts FP8 on a CPU one number at a time. The bits of both types also sit
in an fp16: E5M2 is its upper byte, and E4M3 moved to its place is 2⁻⁸ of the value.
"""

from __future__ import annotations

import torch

__all__ = ["codes_to_float"]


def codes_to_float(codes: torch.Tensor) -> torch.Tensor:
    """Return ``codes.float()`` in a new tensor, quickly for FP8 E4M3FN and E5M2 on the CPU."""
    if codes.device.type != "cpu" or codes.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return codes.float()
    bits = codes.view(torch.int8).to(torch.int16)
    if codes.dtype == torch.float8_e5m2:
        return bits.bitwise_left_shift_(8).view(torch.float16).float()
    # The sign of an int16 made from an int8 is in all its upper bits: keep the first.
    half = bits.bitwise_left_shift(7).bitwise_and_(0x3F80)
    half.bitwise_or_(bits.bitwise_and_(-0x8000))
    nan = half.bitwise_and(0x7FFF) == 0x3F80
    value = half.view(torch.float16).float().mul_(256)
    return value.masked_fill_(nan, torch.nan) if bool(nan.any()) else value
