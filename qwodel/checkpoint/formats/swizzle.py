"""The order in which tensor cores want block scales, which ComfyUI's FP4 and MX formats store them in.

A scale matrix is padded to tiles of 128 × 4, and a tile is laid out as 32 × (4·4):
https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

__all__ = ["swizzle_scales", "swizzled_shape", "unswizzle_scales"]


def swizzled_shape(rows: int, groups: int) -> tuple[int, int]:
    """The shape of the stored matrix: ``[roundup(rows, 128), roundup(groups, 4)]``."""
    return -(-rows // 128) * 128, -(-groups // 4) * 4


def swizzle_scales(scales: torch.Tensor) -> torch.Tensor:
    """``[rows, groups]`` → the stored matrix, padded with zeros."""
    tall, wide = swizzled_shape(*scales.shape)
    padded = pad(scales, (0, wide - scales.shape[1], 0, tall - scales.shape[0]))
    tiles = padded.reshape(tall // 128, 4, 32, wide // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(tall, wide).contiguous()


def unswizzle_scales(scales: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """Undo the tensor-core order of block scales: → the ``[rows, groups]`` they stand for.

    The stored matrix is ``[roundup(rows, 128), roundup(groups, 4)]`` with tiles
    of 128×4 laid out as 32×(4·4).
    """
    tall, wide = -(-rows // 128), -(-groups // 4)
    tiles = scales.reshape(tall * wide, 32, 4, 4).transpose(1, 2).reshape(tall, wide, 128, 4)
    return tiles.permute(0, 2, 1, 3).reshape(tall * 128, wide * 4)[:rows, :groups]
