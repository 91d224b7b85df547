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
    # An int16 made from an int8 has the sign in all its upper bits: moved by 7, the first and one of the rest.
    half = bits.bitwise_left_shift_(7).bitwise_and_(-0x4080)
    value = half.view(torch.float16).float().mul_(256)
    # NaN has the greatest bits, and a maximum is quicker than looking at every code for it.
    if half.numel() and int(half.bitwise_and_(0x7FFF).amax()) == 0x3F80:
        value.masked_fill_(half == 0x3F80, torch.nan)
    return value
