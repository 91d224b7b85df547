"""Decoding the 4-bit floating-point layouts that checkpoints come in: MXFP4 and NVFP4.

E2M1 values after the OCP Microscaling specification 1.0; MXFP4 blocks as
gpt-oss stores them (32 values and one E8M0 exponent); NVFP4 blocks as ModelOpt
and compressed-tensors store them (16 values and one E4M3 scale).
"""

from __future__ import annotations

import torch

__all__ = ["E2M1_VALUES", "decode_mxfp4", "decode_nvfp4", "unswizzle_scales"]

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each 4-bit code; the high bit is the sign."""


def _values(packed: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    """uint8 ``[…, n]`` → fp32 ``[…, 2n]``; the first value of each byte is in its low nibble unless said otherwise."""
    table = torch.tensor(E2M1_VALUES, dtype=torch.float32)
    low, high = table[(packed & 0x0F).long()], table[(packed >> 4).long()]
    pair = (high, low) if high_first else (low, high)
    return torch.stack(pair, dim=-1).flatten(-2)


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Decode gpt-oss blocks to bf16, which holds every value exactly.

    Args:
        blocks: uint8 ``[E, rows, G, 16]``, two values a byte.
        scales: uint8 ``[E, rows, G]``, exponents with bias 127.

    Returns:
        ``[E, G·32, rows]``: the experts' matrices are stored transposed.
    """
    exponent = scales.to(torch.int32) - 127
    values = torch.ldexp(_values(blocks), exponent.unsqueeze(-1))
    return values.flatten(-2).transpose(-1, -2).contiguous().to(torch.bfloat16)


def decode_nvfp4(
    packed: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor, *, high_first: bool = False
) -> torch.Tensor:
    """Decode NVFP4 to fp32.

    Args:
        packed: uint8 ``[M, N/2]``.
        scales: ``[M, N/16]``, E4M3 (as stored or already fp32).
        global_scale: one fp32 *dequant* factor for the whole matrix.
        high_first: the first of two values is in the high nibble (ComfyUI's order).
    """
    values = _values(packed, high_first=high_first).reshape(*packed.shape[:-1], -1, 16)
    scale = scales.float() * global_scale.float().reshape(())
    decoded: torch.Tensor = values * scale.unsqueeze(-1)
    return decoded.flatten(-2)


def unswizzle_scales(scales: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """Undo the tensor-core order of block scales: → the ``[rows, groups]`` they stand for.

    The stored matrix is ``[roundup(rows, 128), roundup(groups, 4)]`` with tiles
    of 128×4 laid out as 32×(4·4).
    """
    tall, wide = -(-rows // 128), -(-groups // 4)
    tiles = scales.reshape(tall * wide, 32, 4, 4).transpose(1, 2).reshape(tall, wide, 128, 4)
    return tiles.permute(0, 2, 1, 3).reshape(tall * 128, wide * 4)[:rows, :groups]
