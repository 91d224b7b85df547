"""An affiner's configuration, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic import ValidationError as PydanticError

from qwodel.exceptions import ConfigurationError, did_you_mean

__all__ = ["AffinerConfig", "BlockwiseSolver", "PTQDSolver", "Settings", "TACSolver", "parse_config"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BlockwiseSolver(_Strict):
    """MSERel: ``Σ A(Kε̂ + b − ε)² + λ₁(K−1)² + λ₂b²`` with ``A = α + (1−α)/(ε² + floor·mean ε²)``."""

    type: Literal["mserel"] = "mserel"
    blocksize: int = Field(8, ge=1)
    alpha: float = Field(0.5, ge=0, le=1)
    lambda1: float = Field(0.1, gt=0)
    lambda2: float = Field(0.1, gt=0)
    floor: float = Field(1.0, ge=0)
    sample_mode: Literal["interpolate", "block"] = "block"
    percentile: float = Field(100.0, ge=0, le=100)
    greater: bool = False
    scale: float = Field(1.0, ge=0, le=1)
    verbose: bool = False


class PTQDSolver(_Strict):
    """``ε̂ = (1+k)ε + bias``: one k, and a bias a channel (PTQD, arXiv 2305.10657)."""

    scale: float = Field(1.0, ge=0, le=1)
    verbose: bool = False


class TACSolver(_Strict):
    """One factor a channel, for elements above ``threshold`` times the mean magnitude."""

    lambda1: float = Field(0.1, ge=0, le=1)
    lambda2: float = Field(0.1, gt=0)
    floor: float = Field(1.0, ge=0)
    threshold: float = Field(0.0, ge=0)
    scale: float = Field(1.0, ge=0, le=1)
    verbose: bool = False


T = TypeVar("T", bound=BaseModel)
Solver = BlockwiseSolver | PTQDSolver | TACSolver
_SOLVERS: dict[str, type[Solver]] = {"blockwise": BlockwiseSolver, "ptqd": PTQDSolver, "tac": TACSolver}


class Settings(_Strict):
    """What is learned from, and what is corrected.

    ``max_timestep`` is the number of denoising steps of a sampling run, ``sample_size`` the greatest number
    of runs. ``enable_timesteps`` numbers the steps to correct, from 0; all where ``None``.
    ``denoiser`` and ``timestep`` name the model's denoiser and the denoiser's timestep argument,
    where they are not found by themselves.
    """

    max_timestep: int = Field(50, ge=1)
    sample_size: int = Field(256, ge=1)
    enable_timesteps: tuple[int, ...] | None = None
    recurrent: bool = True
    noise_target: Literal["uncond", "text", "all"] = "all"
    enable_latent_affine: bool = False
    solver_type: Literal["mserel"] = "mserel"
    solver_config: dict[str, Any] = {}
    denoiser: str | None = None
    timestep: str | None = None
    seed: int = 0

    @field_validator("recurrent")
    @classmethod
    def _only_recurrent(cls, value: bool) -> bool:
        if not value:
            raise ValueError(
                "both models are given the latents of the full-precision one; apart, their paths differ by"
                " more than the error of a step, and a correction learned from that makes samples worse"
            )
        return value

    @field_validator("enable_latent_affine")
    @classmethod
    def _no_latents(cls, value: bool) -> bool:
        if value:
            raise ValueError("latents belong to the scheduler; only the denoiser's output is corrected")
        return value


class AffinerConfig(_Strict):
    """The dictionary that ``load_affiner`` takes; ``extra_args`` go to every call of the models."""

    type: Literal["blockwise", "ptqd", "tac"] = "blockwise"
    config: Settings = Settings()
    extra_args: dict[str, Any] = {}

    def solver(self) -> Solver:
        """Return the solver's checked configuration."""
        return _parse(_SOLVERS[self.type], self.config.solver_config, "solver_config")


def parse_config(given: Mapping[str, Any]) -> AffinerConfig:
    """Check a configuration.

    Raises:
        ConfigurationError: a key is unknown or has a bad value.
    """
    config = _parse(AffinerConfig, given, "")
    config.solver()
    return config


def _parse(model: type[T], given: Mapping[str, Any], where: str) -> T:
    try:
        return model.model_validate(dict(given))
    except PydanticError as error:
        first = error.errors()[0]
        path = ".".join(filter(None, [where, *map(str, first["loc"])]))
        if first["type"] == "extra_forbidden":
            fields = Settings.model_fields if first["loc"][0] == "config" else model.model_fields
            raise ConfigurationError(
                f"the affiner has no option {path!r}",
                hint=did_you_mean(str(first["loc"][-1]), fields) or f"options: {', '.join(fields)}",
            ) from None
        raise ConfigurationError(
            f"affiner option {path!r}: {first['msg'].removeprefix('Value error, ')}",
            hint="see the page on sampling for its values",
        ) from None
