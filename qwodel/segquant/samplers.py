"""Which calls of the denoiser are kept for calibration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qwodel.exceptions import ConfigurationError

__all__ = ["AllSampler", "NormalSampler", "Sampler", "TimestepSampler", "UniformSampler"]


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Chooses among the calls of one layer during one sampling run, numbered from 0.

    With most schedulers a call is a timestep, the noisiest first.

    Attributes:
        max_timestep: only the first so many calls of a run count; all where ``None``.
        sample_size: how many batches of the data loader are run; all where ``None``.
        seed: run ``r`` starts with torch's generators at ``seed + r``.
    """

    max_timestep: int | None = None
    sample_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_timestep", "sample_size", "timestep_per_sample"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} is {value}", hint="give 1 or more, or None for all")

    @abstractmethod
    def choose(self, calls: int, run: int) -> Sequence[int]:
        """Return the numbers of the calls to keep out of ``calls``, rising, for sampling run ``run``."""

    def settings(self) -> dict[str, Any]:
        """Return what decides the choice, for comparison with a stored set."""
        return {"sampler": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class AllSampler(Sampler):
    """Every call."""

    def choose(self, calls: int, run: int) -> Sequence[int]:
        """All of them."""
        return range(calls)


@dataclass(frozen=True, kw_only=True)
class UniformSampler(Sampler):
    """Calls at equal distances, first and last included (Q-Diffusion, arXiv 2302.04304)."""

    timestep_per_sample: int = 5

    def choose(self, calls: int, run: int) -> Sequence[int]:
        """``timestep_per_sample`` numbers at even distances, first and last among them; one is the middle."""
        count = min(self.timestep_per_sample, calls)
        if count == 1:
            return [(calls - 1) // 2]
        return [round(place * (calls - 1) / (count - 1)) for place in range(count)]


@dataclass(frozen=True, kw_only=True)
class NormalSampler(Sampler):
    """Distinct calls drawn with normally distributed odds, others for each run (PTQ4DM, arXiv 2211.15736).

    Attributes:
        timestep_per_sample: how many are drawn.
        mean: centre as a share of the run: 0 is the first, noisiest call, 1 the last.
        std: standard deviation as a share of the run.
    """

    timestep_per_sample: int = 5
    mean: float = 0.6
    std: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mean <= 1 or self.std <= 0:
            raise ConfigurationError(
                f"mean {self.mean} and std {self.std} do not lie within a run",
                hint="both are shares of a run: 0 ≤ mean ≤ 1, std > 0",
            )

    def choose(self, calls: int, run: int) -> Sequence[int]:
        """``timestep_per_sample`` numbers drawn without replacement, by normal odds over a run mapped to [0, 1]."""
        places = torch.linspace(0, 1, calls, dtype=torch.float64) if calls > 1 else torch.zeros(1)
        odds = torch.exp(-(((places - self.mean) / self.std) ** 2) / 2).clamp_min(1e-12)
        generator = torch.Generator().manual_seed(self.seed + run)
        drawn = torch.multinomial(odds, min(self.timestep_per_sample, calls), generator=generator)
        return sorted(int(place) for place in drawn)


@dataclass(frozen=True, kw_only=True)
class TimestepSampler(Sampler):
    """The calls that ``timesteps`` numbers; negative numbers count from the end of the run."""

    timesteps: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "timesteps", tuple(self.timesteps))
        if not self.timesteps:
            raise ConfigurationError("no timestep is given", hint="AllSampler keeps them all")

    def choose(self, calls: int, run: int) -> Sequence[int]:
        """The numbers given, rising and once each; negative ones count from the end.

        Raises:
            ConfigurationError: a number outside the run.
        """
        outside = [each for each in self.timesteps if not -calls <= each < calls]
        if outside:
            raise ConfigurationError(
                f"a run has {calls} calls; there is none with number {outside[0]}",
                hint=f"give numbers from 0 to {calls - 1}, or more denoising steps",
            )
        return sorted({each % calls for each in self.timesteps})
