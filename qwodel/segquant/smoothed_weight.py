"""A weight with its smoothing multiplied in, and the low-rank branch that computes a part of it in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from qwodel.algorithms.low_rank import low_rank
from qwodel.segquant.settings import Optimum, OptimumSettings

__all__ = ["Factors", "SmoothedWeight", "low_rank_branch"]

_RANK_SHARE = 4
"""A branch has at most this part of a layer's smaller side for its rank."""

Factors = tuple[torch.Tensor, torch.Tensor]
"""A branch: up ``[M, R]`` and down ``[R, N]``, in 16 bits."""


@dataclass(frozen=True, slots=True, eq=False)
class SmoothedWeight:
    """What codes and a branch have to make up between them.

    Attributes:
        weight: ``[M, N]``, its columns multiplied by ``smoothing``.
        smoothing: what inputs are divided by, ``[N]``; ``None`` leaves them as they are.
        branch: the branch of the weight itself; ``None`` where the method has none.
    """

    weight: torch.Tensor
    smoothing: torch.Tensor | None
    branch: Factors | None

    @classmethod
    def of(
        cls, weight: torch.Tensor, smoothing: torch.Tensor | None, opt: OptimumSettings, dtype: torch.dtype
    ) -> Self:
        """Of a weight ``[M, N]`` of a layer in ``dtype``."""
        smoothed = weight if smoothing is None else weight * smoothing
        branch = low_rank_branch(smoothed, opt, dtype) if opt.type is Optimum.SVD else None
        return cls(smoothed, smoothing, branch)

    def inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """What this weight meets where the layer reads ``rows``."""
        return rows if self.smoothing is None else rows / self.smoothing

    def gram(self, rows: torch.Tensor) -> torch.Tensor:
        """The mean Gram matrix ``[N, N]`` of :meth:`inputs`."""
        fit = self.inputs(rows)
        return fit.T @ fit / len(fit)


def low_rank_branch(
    weight: torch.Tensor, opt: OptimumSettings, dtype: torch.dtype, gram: torch.Tensor | None = None
) -> Factors:
    """The branch nearest to a weight; codes take in what its own rounding leaves.

    Args:
        weight: ``[M, N]``.
        opt: rank and precision.
        dtype: of the layer; the branch is in bf16 where it is that, else in fp16.
        gram: ``[N, N]`` of the inputs; nearest in outputs where given.
    """
    # A branch of full rank would be the layer itself in floating point.
    rank = max(min(opt.low_rank, min(weight.shape) // _RANK_SHARE), 1)
    precision = torch.float64 if opt.precision == "float64" else torch.float32
    up, down = low_rank(weight, rank, gram, dtype=precision)
    # Factors of equal size stay far from the ends of fp16.
    balance = (up.abs().amax(dim=0) / down.abs().amax(dim=1).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    return (up / balance).to(stored).contiguous(), (down * balance[:, None]).to(stored).contiguous()
