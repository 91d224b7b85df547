"""Put the mean of the quantization error back through the bias.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
https://arxiv.org/abs/1906.04721.
"""

from __future__ import annotations

import torch

from qwodel.algorithms.tiles import check_finite
from qwodel.exceptions import ValidationError

__all__ = ["correct_bias"]


def correct_bias(
    bias: torch.Tensor, weight: torch.Tensor, dequantized: torch.Tensor, input_mean: torch.Tensor | None
) -> torch.Tensor:
    """b' = b + (W − Ŵ) x̄, with which the mean output is that of the original layer.

    Since E[Wx + b] = W x̄ + b and the quantized layer computes Ŵx + b', the sign is plus.

    Args:
        bias: ``[M]``.
        weight, dequantized: ``[M, N]`` original and quantized weight.
        input_mean: ``[N]`` measured mean of the layer's inputs; with ``None`` nothing is
            known, and the bias is returned as it is.

    Returns:
        ``[M]`` of the bias's dtype.

    Raises:
        ValidationError: shapes that do not fit, or a mean that is not finite.
    """
    if input_mean is None:
        return bias
    rows, columns = weight.shape
    if dequantized.shape != weight.shape or bias.shape != (rows,) or input_mean.shape != (columns,):
        raise ValidationError(
            f"a bias {list(bias.shape)}, weights {list(weight.shape)} and {list(dequantized.shape)} "
            f"and an input mean {list(input_mean.shape)} do not belong together"
        )
    check_finite(input_mean, "the input mean")
    error = weight.double() - dequantized.double()
    return (bias.double() + error @ input_mean.double()).to(bias.dtype)
