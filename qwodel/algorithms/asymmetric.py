"""Weights that make up for what earlier layers have done to their inputs (asymmetric calibration).

GPTAQ (Li et al., https://arxiv.org/abs/2504.02692) asks for ‖X₀Wᵀ − XŴᵀ‖² to be small, X₀ being what a
layer of the unquantized model reads and X what it reads behind quantized ones. Up to a constant that is
‖X(W* − Ŵ)ᵀ‖² with W* = W + W·(X₀ − X)ᵀX·(XᵀX)⁻¹: the layer is rounded as ever, with W* for a target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwodel.algorithms.gram import InputStatistics
from qwodel.algorithms.scale_choice import check_gram

__all__ = ["ASYMMETRIC_DAMPING", "asymmetric_targets"]

ASYMMETRIC_DAMPING = 3.0
"""λ as a share of the mean diagonal. A few thousand tokens say little of directions that inputs seldom take;
W* keeps to W there. With little damping it fits the calibration text only."""


def asymmetric_targets(
    weights: Sequence[torch.Tensor], statistics: InputStatistics, damping: float = ASYMMETRIC_DAMPING
) -> list[torch.Tensor]:
    """W* of weights that read the same inputs: argmin of ‖X₀Wᵀ − XW*ᵀ‖² + λ‖W* − W‖².

    Args:
        weights: ``[M_i, N]`` each.
        statistics: with ``gram`` and ``drift``; without ``drift`` the weights are returned as they are.
        damping: λ as a share of the Gram matrix's mean diagonal.

    Returns:
        fp32 ``[M_i, N]`` each (fp64 of fp64 weights).

    Raises:
        ValidationError: the Gram matrix does not fit the weights.
    """
    if statistics.drift is None or statistics.gram is None:
        return list(weights)
    scale = float(statistics.gram.diagonal().double().sum()) / max(len(statistics.gram), 1)
    if scale == 0:
        return list(weights)
    # With as much damping the condition number is below N: fp32 is enough.
    gram = check_gram(statistics.gram, weights[0].shape[1])
    gram.diagonal().add_(damping)
    lower = torch.linalg.cholesky(gram)
    drift = (statistics.drift / scale).to(gram.device, torch.float32)
    rows = torch.cat([weight.to(gram.device, torch.float32) for weight in weights])
    moved = torch.cholesky_solve((rows @ drift).T, lower).T
    parts = torch.split(moved, [len(weight) for weight in weights])
    return [
        weight.double() + part if weight.dtype == torch.float64 else weight.float() + part
        for weight, part in zip(weights, parts, strict=True)
    ]
