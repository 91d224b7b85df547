"""Simulated integer quantization: round to the grid, stay in floating point, leave the input alone.

A symmetric code is ``round(x / s)`` in [−2ⁿ⁻¹, 2ⁿ⁻¹ − 1] and stands for ``code · s``. An asymmetric one
is ``round(x / s) + z`` with the zero point ``z = round(qmin − min / s)`` and stands for ``(code − z) · s``.
Scales are static where they are given, and dynamic (from the tensor itself) where they are not.
"""

from __future__ import annotations

from typing import Literal

import torch

from qwodel.exceptions import ConfigurationError, ValidationError

__all__ = [
    "Grouping",
    "fake_quantize",
    "fake_quantize_activation_per_channel_asymmetric",
    "fake_quantize_activation_per_channel_symmetric",
    "fake_quantize_activation_per_tensor_asymmetric",
    "fake_quantize_activation_per_tensor_symmetric",
    "fake_quantize_activation_per_token_asymmetric",
    "fake_quantize_activation_per_token_symmetric",
    "fake_quantize_weight_per_channel_asymmetric",
    "fake_quantize_weight_per_channel_symmetric",
    "fake_quantize_weight_per_tensor_asymmetric",
    "fake_quantize_weight_per_tensor_symmetric",
    "quantization_scales",
]

Grouping = Literal["rows", "columns", "tensor"]
"""What shares a scale: a row (a token, an output channel), a column (an input channel), or all."""


def quantization_scales(
    tensor: torch.Tensor, grouping: Grouping, *, n_bits: int = 8, symmetric: bool = True
) -> torch.Tensor:
    """Return the smallest scales that clip nothing, fp32: ``[...]`` of rows, ``[N]`` of columns, or ``[]``.

    Symmetric: ``max|x| / (2ⁿ⁻¹ − 1)``; asymmetric: ``(max − min) / (2ⁿ − 1)``, zero being in the range.
    A group of zeros gets the scale 1.

    Raises:
        ConfigurationError: ``n_bits`` outside 2..16.
    """
    _check_bits(n_bits)
    x = tensor.detach().float()
    if symmetric:
        span, steps = _reduce(x.abs(), grouping, largest=True), 2 ** (n_bits - 1) - 1
    else:
        high = _reduce(x, grouping, largest=True).clamp(min=0)
        span, steps = high - _reduce(x, grouping, largest=False).clamp(max=0), 2**n_bits - 1
    scales = span / steps
    return torch.where(scales > 0, scales, 1.0)


def fake_quantize(
    tensor: torch.Tensor,
    grouping: Grouping,
    scales: torch.Tensor | None = None,
    zero_points: torch.Tensor | None = None,
    *,
    n_bits: int = 8,
    symmetric: bool = True,
) -> torch.Tensor:
    """Return ``tensor`` rounded to an integer grid, a new tensor of the same shape and dtype.

    Args:
        tensor: ``[..., N]``, floating point; computed in fp32.
        grouping: what shares a scale.
        scales: static scales of the shape :func:`quantization_scales` gives (a trailing 1 may stand
            behind those of rows); from the tensor where ``None``.
        zero_points: static zero points of the same shape, asymmetric only; from the tensor's least
            values where ``None``.
        n_bits: bits a code.
        symmetric: without a zero point.

    Raises:
        ConfigurationError: ``n_bits`` outside 2..16, or zero points of symmetric codes.
        ValidationError: scales of another shape, or not positive and finite.
    """
    _check_bits(n_bits)
    if symmetric and zero_points is not None:
        raise ConfigurationError("symmetric codes have no zero points")
    x = tensor.detach().float()
    if scales is None:
        scales = quantization_scales(tensor, grouping, n_bits=n_bits, symmetric=symmetric)
    scale = _aligned(scales, x, grouping, "scales")
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValidationError("quantization scales must be positive and finite")
    low, high = -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1
    if symmetric:
        return (torch.round(x / scale).clamp_(low, high) * scale).to(tensor.dtype)
    if zero_points is None:
        least = _reduce(x, grouping, largest=False).clamp(max=0)
        zero = torch.round(low - _aligned(least, x, grouping, "minima") / scale).clamp(low, high)
    else:
        zero = _aligned(zero_points, x, grouping, "zero_points")
    codes = (torch.round(x / scale) + zero).clamp_(low, high)
    return ((codes - zero) * scale).to(tensor.dtype)


def fake_quantize_activation_per_token_symmetric(
    activation: torch.Tensor, scales: torch.Tensor | None = None, *, n_bits: int = 8
) -> torch.Tensor:
    """Round ``[..., N]`` activations with one scale a token; ``scales`` ``[...]``. See :func:`fake_quantize`."""
    return fake_quantize(activation, "rows", scales, n_bits=n_bits)


def fake_quantize_activation_per_token_asymmetric(
    activation: torch.Tensor,
    scales: torch.Tensor | None = None,
    zero_points: torch.Tensor | None = None,
    *,
    n_bits: int = 8,
) -> torch.Tensor:
    """Round ``[..., N]`` activations with one scale and zero point a token; both ``[...]``.

    With scales alone, the zero points come from each token's least value.
    """
    return fake_quantize(activation, "rows", scales, zero_points, n_bits=n_bits, symmetric=False)


def fake_quantize_activation_per_channel_symmetric(
    activation: torch.Tensor, scales: torch.Tensor | None = None, *, n_bits: int = 8
) -> torch.Tensor:
    """Round ``[..., N]`` activations with one scale a channel, ``[N]``.

    No integer product takes such scales; it is what activations could be at best.
    """
    return fake_quantize(activation, "columns", scales, n_bits=n_bits)


def fake_quantize_activation_per_channel_asymmetric(
    activation: torch.Tensor,
    scales: torch.Tensor | None = None,
    zero_points: torch.Tensor | None = None,
    *,
    n_bits: int = 8,
) -> torch.Tensor:
    """Round ``[..., N]`` activations with one scale and zero point a channel, both ``[N]``."""
    return fake_quantize(activation, "columns", scales, zero_points, n_bits=n_bits, symmetric=False)


def fake_quantize_activation_per_tensor_symmetric(
    activation: torch.Tensor, scales: torch.Tensor | None = None, *, n_bits: int = 8
) -> torch.Tensor:
    """Round activations with one scale, ``[]``."""
    return fake_quantize(activation, "tensor", scales, n_bits=n_bits)


def fake_quantize_activation_per_tensor_asymmetric(
    activation: torch.Tensor,
    scales: torch.Tensor | None = None,
    zero_points: torch.Tensor | None = None,
    *,
    n_bits: int = 8,
) -> torch.Tensor:
    """Round activations with one scale and zero point, both ``[]``."""
    return fake_quantize(activation, "tensor", scales, zero_points, n_bits=n_bits, symmetric=False)


def fake_quantize_weight_per_channel_symmetric(
    weight: torch.Tensor, scales: torch.Tensor | None = None, *, n_bits: int = 8
) -> torch.Tensor:
    """Round an ``[M, N]`` weight with one scale an output channel, ``[M]``."""
    return fake_quantize(weight, "rows", scales, n_bits=n_bits)


def fake_quantize_weight_per_channel_asymmetric(
    weight: torch.Tensor,
    scales: torch.Tensor | None = None,
    zero_points: torch.Tensor | None = None,
    *,
    n_bits: int = 8,
) -> torch.Tensor:
    """Round an ``[M, N]`` weight with one scale and zero point an output channel, both ``[M]``."""
    return fake_quantize(weight, "rows", scales, zero_points, n_bits=n_bits, symmetric=False)


def fake_quantize_weight_per_tensor_symmetric(
    weight: torch.Tensor, scales: torch.Tensor | None = None, *, n_bits: int = 8
) -> torch.Tensor:
    """Round a weight with one scale, ``[]``."""
    return fake_quantize(weight, "tensor", scales, n_bits=n_bits)


def fake_quantize_weight_per_tensor_asymmetric(
    weight: torch.Tensor,
    scales: torch.Tensor | None = None,
    zero_points: torch.Tensor | None = None,
    *,
    n_bits: int = 8,
) -> torch.Tensor:
    """Round a weight with one scale and zero point, both ``[]``."""
    return fake_quantize(weight, "tensor", scales, zero_points, n_bits=n_bits, symmetric=False)


def _check_bits(n_bits: int) -> None:
    if not 2 <= n_bits <= 16:
        raise ConfigurationError(f"n_bits lies in 2..16, not {n_bits}")


def _reduce(x: torch.Tensor, grouping: Grouping, *, largest: bool) -> torch.Tensor:
    reduce = torch.amax if largest else torch.amin
    if grouping == "rows":
        return reduce(x, dim=-1)
    if grouping == "columns":
        return reduce(x.reshape(-1, x.shape[-1]), dim=0)
    return reduce(x)


def _aligned(values: torch.Tensor, x: torch.Tensor, grouping: Grouping, what: str) -> torch.Tensor:
    """Values of groups, shaped so that they broadcast over ``x``."""
    values = torch.as_tensor(values).to(device=x.device, dtype=torch.float32)
    shape = {"rows": x.shape[:-1], "columns": x.shape[-1:], "tensor": torch.Size()}[grouping]
    fits = values.shape in (shape, (*shape, 1)) or (grouping == "tensor" and values.numel() == 1)
    if not fits:
        raise ValidationError(f"{what} of shape {list(values.shape)} do not fit: {list(shape)} are needed")
    return values.reshape(shape).unsqueeze(-1) if grouping == "rows" else values.reshape(shape)
