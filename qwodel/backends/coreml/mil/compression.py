"""The ``constexpr`` operations: compressed weights → dense ones, by their formulas."""

from __future__ import annotations

import numpy as np
import torch

from qwodel.backends.coreml.mil.registry import operation
from qwodel.backends.coreml.mil.weight_file import unpack_bits

__all__: list[str] = []

Tensor = torch.Tensor


@operation("constexpr_affine_dequantize")
def affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: Tensor) -> Tensor:
    """scale · (q − zero_point), both along one axis (iOS 16)."""
    shape = [-1 if at == int(axis) else 1 for at in range(quantized_data.ndim)]
    offset = zero_point.float().reshape(shape if zero_point.ndim else [1] * quantized_data.ndim)
    factor = scale.float().reshape(shape if scale.ndim else [1] * quantized_data.ndim)
    return (quantized_data.float() - offset) * factor


@operation("constexpr_blockwise_shift_scale")
def blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale · (data − offset), one of each a block; block sizes follow from the shapes (iOS 18)."""
    wide = _repeat(scale.float(), data.shape)
    values = data.float() if offset is None else data.float() - _repeat(offset.float(), data.shape)
    return values * wide


@operation("constexpr_lut_to_dense")
def lut_to_dense(
    indices: Tensor, lut: Tensor, vector_axis: Tensor | None = None, shape: Tensor | None = None
) -> Tensor:
    """Palette entries by index: one palette (iOS 16, packed bits) or one a block (iOS 18)."""
    if shape is not None:
        sizes = [int(each) for each in shape]
        bits = int(np.log2(len(lut)))
        codes = unpack_bits(indices.reshape(-1).numpy().view(np.uint8), bits, int(np.prod(sizes)))
        return lut[torch.from_numpy(codes.copy()).long()].reshape(sizes)
    if vector_axis is not None and lut.shape[-1] > 1:
        raise ValueError("palettes of vectors")
    blocks = lut.shape[:-2]
    palettes = lut.reshape(-1, lut.shape[-2])
    which = _repeat(torch.arange(len(palettes)).reshape(blocks), indices.shape)
    return palettes[which, indices.long()]


def _repeat(values: Tensor, shape: torch.Size) -> Tensor:
    for axis, size in enumerate(shape):
        values = values.repeat_interleave(size // values.shape[axis], axis)
    return values
