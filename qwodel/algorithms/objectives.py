"""What learned rounding minimises: an error of Ŵ, with its gradient and its curvature.

An objective splits into independent *parts* (all rows together, or each row alone); the
loop keeps the best iterate of each part. With E = Ŵ − W, f(E) = loss² / 2 is quadratic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from qwodel.exceptions import ConfigurationError

__all__ = ["ChannelObjective", "GramObjective", "Objective", "ProjectedObjective", "top_singular_vectors"]

_SPARSE = 1 / 16  # up to this share of changes a sparse product beats a dense one on a CPU


class Objective(ABC):
    """A quadratic form of the weight error."""

    weight_price: float = 0.0
    """How much loss² a gradient rule must save for each unit it adds to ‖E‖²."""

    @abstractmethod
    def evaluate(self, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each part, fp64 ``[parts]``, and the gradient ∂f/∂E, fp32 ``[M, N]``."""

    def follow(
        self, error: torch.Tensor, gradient: torch.Tensor, change: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`evaluate`, where the gradient before the last ``change`` of the error is known."""
        return self.evaluate(error)

    @abstractmethod
    def curvature(self) -> torch.Tensor:
        """∂²f/∂E_ij², broadcastable to ``[M, N]``: what changing one weight alone costs."""


class ProjectedObjective(Objective):
    """L = ‖U_kᵀ E V_k‖_F: the error along the k strongest directions of the weight itself.

    Args:
        left: ``[M, k]`` orthonormal columns U_k.
        right: ``[N, k]`` orthonormal columns V_k.
        weight_price: see :attr:`Objective.weight_price`. The directions are a guess at what
            matters: without a price, their share of the error is removed by adding as much elsewhere.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, weight_price: float = 0.0) -> None:
        self.left, self.right = left, right
        self.weight_price = weight_price

    def evaluate(self, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """‖Uᵀ E V‖_F as fp64 ``[1]``, and its direction U Uᵀ E V Vᵀ, ``[M, N]``."""
        projected = self.left.T @ (error @ self.right)
        loss = projected.double().square().sum().sqrt().reshape(1)
        return loss, (self.left @ projected) @ self.right.T

    def curvature(self) -> torch.Tensor:
        """Σ_k U_ik² · Σ_k V_jk², ``[M, N]``."""
        return self.left.square().sum(dim=1, keepdim=True) * self.right.square().sum(dim=1)


class GramObjective(Objective):
    """‖X Eᵀ‖_F row by row: the error of each output, √(e H eᵀ) with H = XᵀX.

    Args:
        gram: fp32 ``[N, N]``.
    """

    def __init__(self, gram: torch.Tensor) -> None:
        self.gram = gram

    def evaluate(self, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """√(e H eᵀ) of each row, fp64 ``[M]``, and E H, ``[M, N]``."""
        return self._measure(error, error @ self.gram)

    def follow(
        self, error: torch.Tensor, gradient: torch.Tensor, change: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from the last E H, by a sparse product where few weights changed and there is no GPU."""
        if change.is_cuda or int(change.count_nonzero()) > _SPARSE * change.numel():
            return self.evaluate(error)
        return self._measure(error, torch.addmm(gradient, change.to_sparse(), self.gram))

    @staticmethod
    def _measure(error: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (gradient * error).sum(dim=1).double().clamp_(min=0).sqrt(), gradient

    def curvature(self) -> torch.Tensor:
        """The diagonal of H, ``[N]``: one input's energy."""
        return self.gram.diagonal()


class ChannelObjective(Objective):
    """√(Σ_j d_j E_ij²) row by row: the output error if inputs were uncorrelated.

    It has no terms between columns, so rounding to nearest is its exact minimum.

    Args:
        weights: fp32 ``[N]``, d_j ≥ 0.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights

    def evaluate(self, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """√(Σ_j d_j E_ij²) of each row, fp64 ``[M]``, and d_j E_ij, ``[M, N]``."""
        gradient = error * self.weights
        return (gradient * error).sum(dim=1, dtype=torch.float64).sqrt(), gradient

    def curvature(self) -> torch.Tensor:
        """The channels' weights d, ``[N]``."""
        return self.weights


def top_singular_vectors(
    weight: torch.Tensor,
    *,
    top_p: float,
    min_k: int,
    max_k: int,
    full_matrix: bool,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k leading left and right singular vectors, k = ⌊top_p · min(M, N)⌋ within [min_k, max_k].

    Args:
        weight: fp32 ``[M, N]``, not empty.
        full_matrix: a full SVD; otherwise randomized subspace iteration (Halko et al.,
            https://arxiv.org/abs/0909.4061) with ten spare directions and four rounds.
        generator: the source of the random start.

    Returns:
        ``[M, k]`` and ``[N, k]``, fp32.

    Raises:
        ConfigurationError: ``top_p`` outside (0, 1] or not 1 ≤ min_k ≤ max_k.
    """
    if not 0 < top_p <= 1:
        raise ConfigurationError(f"top_p is a share of singular values in (0, 1], not {top_p}")
    if not 1 <= min_k <= max_k:
        raise ConfigurationError(f"1 ≤ min_k ≤ max_k is needed, not min_k={min_k} and max_k={max_k}")
    rank = min(weight.shape)
    k = min(rank, max_k, max(min_k, int(top_p * rank)))
    if full_matrix or k + 10 >= rank:
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :k].contiguous(), right[:k].T.contiguous()
    start = torch.randn(weight.shape[1], k + 10, generator=generator, dtype=torch.float32).to(weight.device)
    basis = torch.linalg.qr(weight @ start).Q
    for _ in range(4):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    small, _, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return (basis @ small)[:, :k].contiguous(), right[:k].T.contiguous()
