"""Sums over pairs of outputs from which every correction is solved, and the solution itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Moments", "Pool", "moments", "share_terms", "solve_gain", "solve_mserel", "solve_ptqd"]

Pool = Callable[[torch.Tensor], torch.Tensor]
"""``[B, C, *spatial]`` to means over blocks, ``[B, C, *blocks]``."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Weighted sums over samples, of means over blocks: float64 ``[C, *blocks]`` each.

    With ε the real and ε̂ the quantized output and A their weight: ``ΣA, ΣAε̂, ΣAε̂², ΣAε, ΣAε̂ε, ΣAε²``.
    """

    s0: torch.Tensor
    s1: torch.Tensor
    s2: torch.Tensor
    t0: torch.Tensor
    t1: torch.Tensor
    r2: torch.Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, name) + getattr(other, name) for name in Moments.__slots__))

    def error(self, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return ``ΣA(Kε̂ + b − ε)²`` for every block."""
        return (
            gain.square() * self.s2 + bias.square() * self.s0 + self.r2
            + 2 * (gain * bias * self.s1 - gain * self.t1 - bias * self.t0)
        )  # fmt: skip


def moments(real: torch.Tensor, quant: torch.Tensor, weight: torch.Tensor, pool: Pool) -> Moments:
    """Sum up one observation; all three are ``[B, C, *spatial]``."""

    def total(values: torch.Tensor) -> torch.Tensor:
        return pool(values).sum(0).double().cpu()

    return Moments(
        total(weight), total(weight * quant), total(weight * quant.square()),
        total(weight * real), total(weight * quant * real), total(weight * real.square()),
    )  # fmt: skip


def solve_mserel(sums: Moments, lambda1: float, lambda2: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the K and b that minimise ``ΣA(Kε̂ + b − ε)² + λ₁(K−1)² + λ₂b²`` in every block.

    For one pair this is ``b = (ε−ε̂)/(1 + λ₂ε̂²/λ₁ + λ₂/A)``, ``K = 1 + λ₂ε̂b/λ₁``.
    """
    a, b, c = sums.s2 + lambda1, sums.s1, sums.s0 + lambda2
    right_gain, right_bias = sums.t1 + lambda1, sums.t0
    determinant = a * c - b * b  # positive: Cauchy-Schwarz, and λ > 0
    return (right_gain * c - right_bias * b) / determinant, (a * right_bias - b * right_gain) / determinant


def solve_gain(sums: Moments, lambda2: float) -> torch.Tensor:
    """Return the K that minimises ``ΣA(Kε̂ − ε)² + λ₂(K−1)²`` in every block."""
    return (sums.t1 + lambda2) / (sums.s2 + lambda2)


def solve_ptqd(sums: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gain and bias of ``ε = (ε̂ − bias_c)/(1+k)`` from sums of one block a channel, ``A = 1``.

    k and the biases are the least-squares fit of ``ε̂ − ε = kε + bias_c``.
    """
    covariance = (sums.t1 - sums.s1 * sums.t0 / sums.s0).sum()
    variance = (sums.r2 - sums.t0.square() / sums.s0).sum()
    slope = covariance / variance if float(variance) > 0 else torch.ones_like(variance)
    slope = slope.clamp_min(1e-3)
    bias = (sums.s1 - slope * sums.t0) / sums.s0
    return (1 / slope).expand_as(bias), -bias / slope


def share_terms(gain: torch.Tensor, bias: torch.Tensor, held_out: Moments) -> tuple[float, float]:
    """Return numerator and denominator of the share of a correction that serves other samples best.

    The error along ``share·((K−1)ε̂ + b)`` is quadratic, so the best share is their ratio.
    """
    g = gain - 1
    along = g * (held_out.s2 - held_out.t1) + bias * (held_out.s1 - held_out.t0)
    square = g.square() * held_out.s2 + 2 * g * bias * held_out.s1 + bias.square() * held_out.s0
    return -float(along.sum()), float(square.sum())
