"""Outputs of denoisers as channels and blocks: ``[B, C, *spatial]`` with one to three spatial dimensions."""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["channels_first", "pool_blocks", "spread_blocks", "whole"]

_POOL = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
_SMOOTH = {1: "linear", 2: "bilinear", 3: "trilinear"}


def channels_first(noise: torch.Tensor) -> torch.Tensor:
    """Return a view with channels in dimension 1: tokens ``[B, T, C]`` become ``[B, C, T]``.

    Applied twice, it gives the tensor back.
    """
    return noise.transpose(1, 2) if noise.ndim == 3 else noise


def pool_blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """Return means over blocks of ``size`` along each spatial dimension (of a video, but the first)."""
    dims = values.ndim - 2
    kernel = [1 if dims == 3 and place == 0 else size for place in range(dims)]
    pooled: torch.Tensor = _POOL[dims](values, kernel, ceil_mode=True, count_include_pad=False)
    return pooled


def whole(values: torch.Tensor) -> torch.Tensor:
    """Return the mean over all spatial dimensions, ``[B, C]``."""
    return values.flatten(2).mean(2)


def spread_blocks(blocks: torch.Tensor, spatial: tuple[int, ...], *, smooth: bool) -> torch.Tensor:
    """Return ``[C, *blocks]`` at every place of ``spatial``, ``[1, C, *spatial]``.

    Constant in each block, or interpolated linearly between the blocks' centres where ``smooth``.
    """
    if blocks.ndim == 1:
        return blocks.reshape(1, -1, *[1] * len(spatial))
    mode = _SMOOTH[len(spatial)] if smooth else "nearest-exact"
    spread: torch.Tensor = functional.interpolate(
        blocks[None], size=spatial, mode=mode, align_corners=False if smooth else None
    )
    return spread
