"""The best approximation of a matrix by one of low rank, plainly or as inputs see it."""

from __future__ import annotations

import torch

from qwodel.algorithms.tiles import check_matrix
from qwodel.exceptions import ConfigurationError

__all__ = ["low_rank"]

_EXACT_UP_TO = 1536
"""Least dimension up to which an eigenproblem is solved; beyond it a randomized SVD is much faster."""
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
_DAMPING = 1e-3


def low_rank(
    weight: torch.Tensor,
    rank: int,
    gram: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``up`` ``[M, r]`` and ``down`` ``[r, N]`` of least ‖W − up·down‖, or ‖X(W − up·down)ᵀ‖ with a Gram matrix.

    With H = CCᵀ the second is the first of W·C, times C⁻¹: whitening, as in SVD-LLM
    (https://arxiv.org/abs/2403.07378) and QERA (https://arxiv.org/abs/2410.06040).

    Args:
        weight: ``[M, N]``, any floating dtype.
        rank: r; no more than min(M, N) is used.
        gram: ``[N, N]`` XᵀX of real inputs, up to a factor.
        dtype: what is computed in.

    Returns:
        both in ``dtype``.

    Raises:
        ConfigurationError: a rank below 1.
        ValidationError: not a floating-point matrix.
    """
    check_matrix(weight)
    if rank < 1:
        raise ConfigurationError(f"a rank is at least 1, not {rank}")
    rank = min(rank, *weight.shape)
    matrix = weight.to(dtype)
    if gram is None:
        return _leading(matrix, rank)
    factor = _root(gram.to(dtype))
    up, down = _leading(matrix @ factor, rank)
    solved: torch.Tensor = torch.linalg.solve_triangular(factor, down, upper=False, left=False)
    return up, solved


def _root(gram: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor of the Gram matrix, damped."""
    mean = gram.diagonal().mean().clamp_min(1e-30)
    damped = gram / mean
    damped.diagonal().add_(_DAMPING)
    lower: torch.Tensor = torch.linalg.cholesky(damped)
    return lower


def _leading(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading singular vectors; ``down`` has orthonormal rows, or ``up`` columns."""
    rows, columns = matrix.shape
    if min(rows, columns) > _EXACT_UP_TO and rank + _OVERSAMPLING < min(rows, columns) // 4:
        left, values, right = _randomized(matrix, rank + _OVERSAMPLING)
        return left[:, :rank] * values[:rank], right[:, :rank].T
    # Eigenvectors of the smaller product are enough, and many times faster than an SVD.
    if rows >= columns:
        down = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -rank:].T
        return matrix @ down.T, down
    up = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]
    return up, up.T @ matrix


def _randomized(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``torch.svd_lowrank`` with a generator of its own: that one draws from the process's.

    Halko, Martinsson and Tropp, https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mH
    generator = torch.Generator(matrix.device).manual_seed(0)
    start = torch.randn(tall.shape[1], rank, dtype=matrix.dtype, device=matrix.device, generator=generator)
    basis = torch.linalg.qr(tall @ start).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(tall.mH @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    inner, values, right = torch.linalg.svd(basis.mH @ tall, full_matrices=False)
    left, right = basis @ inner, right.mH
    return (left, values, right) if tall is matrix else (right, values, left)
