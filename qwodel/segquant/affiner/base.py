"""What every affiner shares: sums for each timestep, solving, correcting, saving."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from bisect import bisect_left
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwodel.exceptions import CalibrationError
from qwodel.output import disk_errors
from qwodel.segquant.affiner.blocks import channels_first
from qwodel.segquant.affiner.config import AffinerConfig, Settings
from qwodel.segquant.affiner.moments import Moments, share_terms

__all__ = ["HEADER", "Affiner", "Solution"]

HEADER = "qwodel_affiner"
Solution = tuple[torch.Tensor, torch.Tensor]
"""Gain and bias, ``[C, *blocks]``."""


class Affiner(ABC):
    """Learns, for each timestep, how to bring a quantized denoiser's output nearer to the real one.

    Attributes:
        config: as it was given.
        timesteps: those met while learning, rising; also such that are not corrected.
    """

    def __init__(self, config: AffinerConfig) -> None:
        self.config = config
        self._solver: Any = config.solver()
        self.timesteps: list[float] = []
        self._folds: dict[float, list[Moments | None]] = {}
        self._fold = 0
        self._solutions: dict[float, Solution] = {}

    @property
    def settings(self) -> Settings:
        """What is learned from, and what is corrected."""
        return self.config.config

    @abstractmethod
    def _sums(self, real: torch.Tensor, quant: torch.Tensor) -> Moments:
        """Sum up an observation, float ``[B, C, *spatial]`` each."""

    @abstractmethod
    def _solve(self, sums: Moments) -> Solution:
        """Return the correction that suits the sums best."""

    def _spread(self, values: torch.Tensor, spatial: tuple[int, ...]) -> torch.Tensor:
        return values.reshape(1, -1, *[1] * len(spatial))

    def _mask(self, quant: torch.Tensor) -> torch.Tensor | None:
        """Return which elements are corrected; ``None`` for all."""
        return None

    def start_run(self, number: int) -> None:
        """Say that what is observed next is sampling run ``number``, from 0."""
        self._fold = number % 2

    def observe(self, timestep: float, real: torch.Tensor, quant: torch.Tensor) -> None:
        """Learn from what both models say at ``timestep`` of the same latents.

        Args:
            timestep: as the denoiser is told it.
            real, quant: outputs, ``[B, C, H, W]``, ``[B, C, F, H, W]`` or tokens ``[B, T, C]``.

        Raises:
            CalibrationError: another shape than before.
        """
        sums = self._sums(channels_first(real).float(), channels_first(quant).float())
        folds = self._folds.setdefault(timestep, [None, None])
        held = folds[self._fold]
        if any(each is not None and each.s0.shape != sums.s0.shape for each in folds):
            raise CalibrationError(
                "the samples have different sizes, and blocks cannot be told apart",
                hint="learn from samples of one size; others are corrected by position",
            )
        folds[self._fold] = sums if held is None else held + sums

    def solve(self) -> None:
        """Solve for every timestep observed.

        Runs with even and odd numbers make two halves. What is learned from either is scaled to the
        share, from 0 to 1, that serves the other best; the correction of all takes that share.
        """
        for timestep, folds in sorted(self._folds.items()):
            halves = [each for each in folds if each is not None]
            total = sum(halves[1:], start=halves[0])
            gain, bias = self._solve(total)
            share = self._share(*halves) if len(halves) == 2 else 1.0
            scale = share * float(self._solver.scale)
            gain, bias = 1 + scale * (gain - 1), scale * bias
            self._solutions[timestep] = gain.float(), bias.float()
            if self._solver.verbose:
                before = total.error(torch.ones_like(gain), torch.zeros_like(bias))
                error = float(total.error(gain, bias).sum() / before.sum().clamp_min(1e-30))
                print(f"timestep {timestep:g}: {error:.0%} of the error is left, share {share:.2f}")
        self.timesteps = sorted({*self.timesteps, *self._solutions})

    def _share(self, first: Moments, second: Moments) -> float:
        """Return the share of a correction that suits runs it was not learned from."""
        terms = [share_terms(*self._solve(first), second), share_terms(*self._solve(second), first)]
        along, square = (sum(column) for column in zip(*terms, strict=True))
        return min(max(along / square, 0.0), 1.0) if square > 0 else 0.0

    def skip(self, timestep: float) -> None:
        """Note a timestep that is not to be corrected."""
        self.timesteps = sorted({*self.timesteps, timestep})

    def correct(self, timestep: float, noise: torch.Tensor) -> torch.Tensor:
        """Return the corrected output; as it is where the nearest timestep has no correction.

        A timestep farther outside those learned than their distance counts as not learned.
        """
        nearest = self._nearest(timestep)
        if nearest not in self._solutions:
            return noise
        values = channels_first(noise).float()
        spatial = tuple(values.shape[2:])
        gain, bias = (self._spread(each.to(values.device), spatial) for each in self._solutions[nearest])
        changed = gain * values + bias
        mask = self._mask(values)
        if mask is not None:
            changed = torch.where(mask, changed, values)
        return channels_first(changed).to(noise.dtype)

    def _nearest(self, timestep: float) -> float | None:
        known = self.timesteps
        if not known:
            return None
        place = bisect_left(known, timestep)
        around = known[max(place - 1, 0) : place + 1]
        nearest = min(around, key=lambda each: abs(each - timestep))
        if known[0] <= timestep <= known[-1]:
            return nearest
        gap = (known[1] - known[0] if place == 0 else known[-1] - known[-2]) if len(known) > 1 else 0.0
        return nearest if abs(nearest - timestep) <= max(gap, 1e-6 * abs(nearest)) else None

    def attach(self, model: Any) -> AbstractContextManager[Any]:
        """Correct a model's denoiser from here on; ``remove()`` or the end of a ``with`` block ends it."""
        from qwodel.segquant.affiner.attach import attach_affiner

        return attach_affiner(model, self)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its header holds configuration and timesteps."""
        target = Path(path)
        header = {
            "version": 1,
            "config": self.config.model_dump(mode="json"),
            "timesteps": self.timesteps,
            "solved": list(self._solutions),
        }
        tensors = {
            f"{place}.{name}": tensor.contiguous()
            for place, solution in enumerate(self._solutions.values())
            for name, tensor in zip(("gain", "bias"), solution, strict=True)
        }
        aside = target.with_name(f".{target.name}.part")
        with disk_errors(f"writing {target}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, aside, {HEADER: json.dumps(header)})
            aside.replace(target)

    def restore(self, timesteps: list[float], solutions: dict[float, Solution]) -> None:
        """Take over what was learned before."""
        self.timesteps, self._solutions = list(timesteps), dict(solutions)
