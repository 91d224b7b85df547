"""Packed weights decoded by the format's description alone, without compressed-tensors.

Eight 4-bit codes lie in an int32, the first in the lowest bits; codes are stored with 8 added. Zero
points are packed the same way along the rows. w = (code − zero) · scale, a scale a group.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """int32 ``[rows, ceil(columns / 8)]`` → codes from −8 to 7, ``[rows, columns]``."""
    shifts = torch.arange(0, 32, 4)
    codes = (packed.unsqueeze(-1).to(torch.int64) >> shifts) & 0xF
    return codes.reshape(packed.shape[0], -1)[:, :columns] - 8


def decode(folder: Path, layer: str) -> torch.Tensor:
    """Return a layer's weight, float32 ``[rows, columns]``."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        rows, columns = (int(each) for each in file.get_tensor(f"{layer}.weight_shape"))
        codes = unpack(file.get_tensor(f"{layer}.weight_packed"), columns)
        scale = file.get_tensor(f"{layer}.weight_scale").float()
        zero = torch.zeros_like(scale)
        if f"{layer}.weight_zero_point" in names:
            packed = file.get_tensor(f"{layer}.weight_zero_point")
            zero = unpack(packed.T.contiguous(), rows).T.float()
    group = columns // scale.shape[1]
    return (codes - zero.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)


def round_to_nearest(weight: torch.Tensor, group: int, *, symmetric: bool) -> torch.Tensor:
    """Return a matrix rounded to four bits with the least and largest value of each group."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // group, group)
    if symmetric:
        scale = blocks.abs().amax(-1, keepdim=True) / 7.5
        return ((blocks / scale).round().clamp(-8, 7) * scale).reshape(rows, columns)
    low = blocks.amin(-1, keepdim=True).clamp(max=0)
    high = blocks.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    codes = ((blocks / scale).round() + zero).clamp(0, 15)
    return ((codes - zero) * scale).reshape(rows, columns)
