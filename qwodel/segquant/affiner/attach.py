"""An affiner on a denoiser: its output is corrected before the pipeline sees it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from qwodel.exceptions import ConfigurationError, ValidationError
from qwodel.segquant.affiner.config import Settings

__all__ = ["AffinerProtocol", "attach_affiner", "find_denoiser", "noise_of", "target_part", "timestep_of"]

_DENOISERS = ("transformer", "unet", "denoiser", "prior")
_TIMESTEPS = ("timestep", "timesteps", "t", "time", "sigma", "noise_level")


class AffinerProtocol(Protocol):
    """What ``load_affiner`` needs of a third party's affiner; ``settings`` may be added."""

    def observe(self, timestep: float, real: torch.Tensor, quant: torch.Tensor) -> None:
        """Learn from both models' outputs for the same latents."""

    def solve(self) -> None:
        """End learning."""

    def correct(self, timestep: float, noise: torch.Tensor) -> torch.Tensor:
        """Return the corrected output, of the same shape and dtype."""


def attach_affiner(model: Any, affiner: AffinerProtocol, settings: Settings | None = None) -> RemovableHandle:
    """Correct what a model's denoiser gives, with a forward hook.

    Args:
        model: a pipeline with a denoiser, or the denoiser.
        affiner: a learned affiner.
        settings: which part of the output is corrected, and names; the affiner's own where ``None``.

    Returns:
        A handle: ``remove()``, or use as a context manager, ends it.

    Raises:
        ConfigurationError: the denoiser, or its timestep argument, is not found.
    """
    settings = settings or getattr(affiner, "settings", None) or Settings()
    denoiser = find_denoiser(model, settings.denoiser)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        noise = noise_of(output)
        timestep = timestep_of(module, args, kwargs, settings.timestep)
        part = target_part(noise, settings.noise_target)
        corrected = affiner.correct(timestep, noise[part])
        if noise[part].shape != noise.shape:
            corrected, whole = noise.clone(), corrected
            corrected[part] = whole
        return _with_noise(output, corrected)

    return denoiser.register_forward_hook(hook, with_kwargs=True)


def find_denoiser(model: Any, name: str | None) -> nn.Module:
    """Return the module of a pipeline that predicts noise.

    Raises:
        ConfigurationError: there is none, or none with that name.
    """
    if name is not None:
        try:
            found = operator.attrgetter(name)(model)
        except AttributeError:
            found = None
    else:
        members = (getattr(model, each, None) for each in _DENOISERS)
        found = next((each for each in members if isinstance(each, nn.Module)), model)
    if not isinstance(found, nn.Module):
        raise ConfigurationError(
            f"{type(model).__name__} has no denoiser" + (f" {name!r}" if name else ""),
            hint="name it in the affiner's config: {'config': {'denoiser': 'attribute'}}",
        )
    return found


def timestep_of(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str | None
) -> float:
    """Return the timestep of a call of the denoiser.

    Raises:
        ConfigurationError: no argument is named like one.
        ValidationError: the call has several.
    """
    given = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments
    names = [name] if name else [each for each in _TIMESTEPS if each in given]
    if not names or names[0] not in given:
        raise ConfigurationError(
            f"no argument of {type(denoiser).__name__} is a timestep: {', '.join(given)}",
            hint="name it in the affiner's config: {'config': {'timestep': 'argument'}}",
        )
    values = torch.as_tensor(given[names[0]]).flatten()
    if not bool((values == values[0]).all()):
        raise ValidationError(
            f"one call of {type(denoiser).__name__} has several timesteps",
            hint="affiners correct samplers that denoise all samples in step",
        )
    return float(values[0])


def noise_of(output: Any) -> torch.Tensor:
    """Return the noise in a denoiser's output: the tensor, or the first of several."""
    if isinstance(output, torch.Tensor):
        return output
    first: torch.Tensor = output[0] if isinstance(output, tuple | list) else next(iter(output.values()))
    return first


def target_part(noise: torch.Tensor, target: str) -> slice:
    """Return the rows that are corrected: all, or the half without or with the text.

    Raises:
        ValidationError: the batch has no halves.
    """
    if target == "all":
        return slice(None)
    if len(noise) % 2:
        raise ValidationError(
            f"a batch of {len(noise)} has no {target} half",
            hint="noise_target='all' corrects every row",
        )
    half = len(noise) // 2
    return slice(half) if target == "uncond" else slice(half, None)


def _with_noise(output: Any, noise: torch.Tensor) -> Any:
    if isinstance(output, torch.Tensor):
        return noise
    if isinstance(output, tuple | list):
        return type(output)([noise, *output[1:]])
    return type(output)(**{**output, next(iter(output)): noise})
