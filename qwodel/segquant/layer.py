"""From an ``nn`` layer to a quantized one: its weight as a matrix, its seams, its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qwodel.modeling.observe.rows import LayerInputs
from qwodel.modules.quantized_conv import ConvGeometry, QuantizedConv
from qwodel.modules.segment_linear import SegmentLinear
from qwodel.segquant.seams import Seams, WeightCut
from qwodel.segquant.settings import LayerSettings, Optimum, OptimumSettings
from qwodel.segquant.solve import LayerProblem, SolvedLayer, shared_smoothing, solve

__all__ = ["Smoothing", "is_target", "quantize_layer", "sample_limit", "sampled_rows", "settle_together"]

_LEAST_ROWS, _ROWS_A_CHANNEL = 4096, 4


def is_target(layer: nn.Module, settings: LayerSettings) -> str | None:
    """Why a layer is left alone, or ``None`` where it is to be quantized."""
    if not settings.enable:
        return "enable is off"
    if not any(type(layer).forward is each.forward for each in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"{type(layer).__name__} computes in a way of its own"
    if not isinstance(layer, nn.Linear):
        return None if settings.conv else "conv is off"
    return None


def matrix_of(layer: nn.Module) -> torch.Tensor:
    """The weight as ``[M, N]`` fp32."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().flatten(1).float()


def sample_limit(layer: nn.Module) -> int:
    """Rows that are kept of a layer's inputs: enough for a Gram matrix of full rank."""
    return max(_LEAST_ROWS, _ROWS_A_CHANNEL * matrix_of(layer).shape[1])


def sampled_rows(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the layer's matrix multiplies, ``[T, N]``; for convolutions that are no matrix product, repeated values."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    geometry = ConvGeometry.of(layer)
    columns = matrix_of(layer).shape[1]
    batched = x if x.ndim == len(geometry.kernel) + 2 else x[None]
    if geometry.has_patches:
        return geometry.patches(geometry.pad(batched))
    # Only the range of its inputs counts: one row of the least values, one of the greatest.
    reach = torch.stack((batched.amin().clamp(max=0), batched.amax().clamp(min=0)))
    return reach[:, None].expand(2, columns)


Smoothing = tuple[float | None, torch.Tensor | None]
"""α, and what inputs are divided by."""


def settle_together(layers: Sequence[nn.Module], inputs: LayerInputs, settings: LayerSettings) -> Smoothing:
    """One smoothing for linear layers that read the same, so that the layer before can take it."""
    matrix = torch.cat([matrix_of(layer) for layer in layers])
    return shared_smoothing(LayerProblem(matrix, inputs, settings, _whole(matrix)))


def quantize_layer(
    name: str,
    layer: Any,
    inputs: LayerInputs,
    settings: LayerSettings,
    seams: Seams,
    smoothing: Smoothing | None = None,
) -> tuple[nn.Module, SolvedLayer]:
    """The quantized layer, and what was chosen for it."""
    bias = None if layer.bias is None else layer.bias.detach().clone()
    dtype = layer.weight.dtype
    matrix = matrix_of(layer)
    if isinstance(layer, nn.Linear):
        cut = seams.cut(name, matrix) if settings.seglinear else _whole(matrix)
        problem = LayerProblem(matrix, inputs, settings, cut, name in seams.activated, smoothing, dtype)
        choice = solve(problem)
        return SegmentLinear(choice.parts, bias, real=settings.real_quant, dtype=dtype), choice
    # Channels of images do not meet a product each, so there is nothing to smooth; weights have a scale a channel.
    plain = settings.model_copy(
        update={
            "opt": OptimumSettings(type=Optimum.DEFAULT),
            "weight_quant": settings.weight_quant.model_copy(update={"axis": 1}),
        }
    )
    choice = solve(LayerProblem(matrix, inputs, plain, _whole(matrix)))
    part = choice.parts[0]
    conv = QuantizedConv(
        part.inputs, part.weight, bias, ConvGeometry.of(layer), real=settings.real_quant, dtype=dtype
    )
    return conv, choice


def _whole(matrix: torch.Tensor) -> WeightCut:
    return WeightCut((matrix.shape[0],), (matrix.shape[1],))
