"""INT8 codes as compressed-tensors packs them: from 0 on, four to a little-endian int32."""

from __future__ import annotations

import torch

__all__ = ["pack_int8", "unpack_int8"]

_SIGN = 0x80


def pack_int8(codes: torch.Tensor) -> torch.Tensor:
    """int8 ``[M, N]``, N a multiple of 4 → int32 ``[M, N/4]``."""
    return (codes.contiguous().view(torch.uint8) ^ _SIGN).view(torch.int32)


def unpack_int8(packed: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_int8`."""
    return (packed.contiguous().view(torch.uint8) ^ _SIGN).view(torch.int8)
