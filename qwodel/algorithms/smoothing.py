"""SmoothQuant: move the difficulty of outlier activations into the weights.

Xiao et al., https://arxiv.org/abs/2211.10438. X Wᵀ = (X / s)(W · s)ᵀ for any positive s per
input channel; the consumer divides its activations by s, or a preceding layer absorbs 1/s.
"""

from __future__ import annotations

import torch

from qwodel.algorithms.tiles import check_finite, check_matrix
from qwodel.exceptions import ConfigurationError, ValidationError

__all__ = ["smooth", "smoothing_scales", "unsmooth"]


def smoothing_scales(
    activation_max: torch.Tensor, weight: torch.Tensor, alpha: float = 0.5, *, power_of_two: bool = False
) -> torch.Tensor:
    """s_j = a_j^α / (max_i |W_ij|)^(1−α), fp32 ``[N]``.

    Channels that never fire or have no weights get 1: there is nothing to balance.

    Args:
        activation_max: ``[N]`` greatest absolute input of each channel.
        weight: ``[M, N]``; rows of several layers that share the input may be stacked.
        alpha: 1 moves all the difficulty of the activations into the weights, 0 evens out the weights.
        power_of_two: round each s_j to a power of two, so that :func:`unsmooth` restores
            every weight bit for bit (short of overflow and underflow).

    Raises:
        ConfigurationError: ``alpha`` outside [0, 1].
        ValidationError: shapes that do not fit, negative or not finite values.
    """
    if not 0 <= alpha <= 1:
        raise ConfigurationError(f"alpha lies in [0, 1], not {alpha}")
    check_matrix(weight)
    if activation_max.shape != (weight.shape[1],):
        raise ValidationError(
            f"activation maxima of shape {list(activation_max.shape)} do not fit {weight.shape[1]} input channels"
        )
    check_finite(activation_max, "the activation maxima")
    check_finite(weight)
    if bool((activation_max < 0).any()):
        raise ValidationError("activation maxima are absolute values: they cannot be negative")
    if weight.shape[0] == 0:
        return torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    peak = weight.abs().amax(dim=0).double()
    active = activation_max.to(peak)
    scales = active.pow(alpha) / peak.pow(1 - alpha)
    scales = torch.where((active > 0) & (peak > 0), scales, 1.0)
    if power_of_two:
        scales = torch.exp2(scales.log2().round())
    limits = torch.finfo(torch.float32)
    return scales.clamp_(limits.tiny, limits.max).float()


def smooth(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """W · diag(s): the weight that goes with activations divided by s. Same dtype as the weight."""
    return _scaled(weight, scales, inverse=False)


def unsmooth(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """W · diag(1/s): undoes :func:`smooth`, exactly where s holds powers of two."""
    return _scaled(weight, scales, inverse=True)


def _scaled(weight: torch.Tensor, scales: torch.Tensor, *, inverse: bool) -> torch.Tensor:
    if weight.ndim != 2 or scales.shape != (weight.shape[1],):
        raise ValidationError(
            f"scales of shape {list(scales.shape)} do not fit a weight of {list(weight.shape)}"
        )
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise ValidationError("smoothing scales must be positive and finite")
    work = weight.double()
    return (work / scales.double() if inverse else work * scales.double()).to(weight.dtype)
