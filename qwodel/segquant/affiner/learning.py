"""load_affiner: learn from sampling runs, or open what was learned."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from qwodel.exceptions import CalibrationError, ConfigurationError, ValidationError
from qwodel.segquant.affiner.attach import (
    AffinerProtocol,
    find_denoiser,
    noise_of,
    target_part,
    timestep_of,
)
from qwodel.segquant.affiner.base import HEADER, Affiner
from qwodel.segquant.affiner.config import AffinerConfig, Settings, parse_config
from qwodel.segquant.affiner.kinds import make_affiner
from qwodel.segquant.sampling_run import call_arguments, seeded
from qwodel.untrusted import checked_number, checked_path, foreign_errors, open_regular, parse_json

__all__ = ["load_affiner"]


def load_affiner(
    config: Mapping[str, Any] | str | Path,
    dataset: Any = None,
    model_real: Any = None,
    model_quant: Any = None,
    latents: Any = None,
    shuffle: bool = True,
    thirdparty_affiner: AffinerProtocol | None = None,
    *,
    dump_path: str | Path | None = None,
) -> Any:
    """Learn an affiner, or load one: ``load_affiner(path)``.

    The full-precision model samples from items of the data set. At every step the quantized denoiser
    is given the same latents, and the affiner sees both outputs. So latents are chained from step
    to step along the path of the full-precision model, and one run of it teaches every timestep.

    Args:
        config: ``{"type": "blockwise" | "ptqd" | "tac", "config": …, "extra_args": …}``, or the path of a
            saved affiner.
        dataset: sampling inputs: a mapping is keyword arguments of the model, a tuple positional ones, anything
            else one argument.
        model_real: the full-precision pipeline, or any callable with a denoiser.
        model_quant: the quantized one, or its denoiser; only the denoiser is called.
        latents: first latents of each run, passed as ``latents``; drawn from a seed where ``None``.
        shuffle: take items in random order, the same for the same seed.
        thirdparty_affiner: an affiner of one's own, which learns instead.
        dump_path: where to save what was learned.

    Returns:
        The learned affiner: a :class:`BlockwiseAffiner`, another kind, or the third party's.

    Raises:
        ConfigurationError: an option is unknown or has a bad value; a model has no denoiser.
        CalibrationError: there is nothing to learn from; a saved file is something else.
    """
    if isinstance(config, str | Path):
        if dataset is not None or model_real is not None or model_quant is not None:
            raise ConfigurationError(
                "a saved affiner is loaded, or a new one learned, not both",
                hint="load_affiner(path), or load_affiner(config, dataset, model_real, model_quant)",
            )
        return _open(checked_path(config, error=CalibrationError))
    parsed = parse_config(config)
    if dataset is None or model_real is None or model_quant is None:
        raise ConfigurationError(
            "learning an affiner takes a data set and both models",
            hint="load_affiner(config, dataset, model_real, model_quant)",
        )
    affiner = thirdparty_affiner if thirdparty_affiner is not None else make_affiner(parsed)
    if dump_path is not None and not hasattr(affiner, "save"):
        raise ConfigurationError(
            f"{type(affiner).__name__} has no save(path)", hint="leave dump_path out, and save it yourself"
        )
    _learn(affiner, parsed, _items(dataset, parsed.config, shuffle), model_real, model_quant, latents)
    if dump_path is not None:
        affiner.save(dump_path)  # type: ignore[attr-defined]
    return affiner


def _items(dataset: Any, settings: Settings, shuffle: bool) -> list[Any]:
    count = len(dataset)
    order = list(range(count))
    if shuffle:
        generator = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(count, generator=generator).tolist()
    items = [dataset[place] for place in order[: settings.sample_size]]
    if not items:
        raise CalibrationError("the affiner's data set is empty", hint="give at least one item")
    return items


def _learn(
    affiner: AffinerProtocol, config: AffinerConfig, items: Sequence[Any], real: Any, quant: Any, latents: Any
) -> None:
    settings = config.config
    if latents is not None and len(latents) < len(items):
        raise CalibrationError(
            f"there are latents for {len(latents)} runs, and {len(items)} items",
            hint="give one entry of latents for each item, or a smaller sample_size",
        )
    watched, quantized = find_denoiser(real, settings.denoiser), find_denoiser(quant, settings.denoiser)
    if watched is quantized:
        raise ConfigurationError("both models have the same denoiser", hint="quantize a copy of it")
    defaults = _defaults(real, settings) | config.extra_args
    for run, item in enumerate(items):
        args, kwargs = call_arguments(item)
        kwargs = {**defaults, **kwargs}
        if latents is not None:
            kwargs["latents"] = latents[run]
        if isinstance(affiner, Affiner):
            affiner.start_run(run)
        lesson = _Lesson(affiner, settings, quantized)
        handle = watched.register_forward_hook(lesson.hook, with_kwargs=True)
        try:
            with torch.no_grad(), seeded(settings.seed + run, kwargs):
                real(*args, **kwargs)
        finally:
            handle.remove()
        if not lesson.observed:
            raise CalibrationError(
                "a sampling run taught nothing: "
                + ("its denoiser was not called" if not lesson.steps else "none of its steps is enabled"),
                hint="check denoiser, max_timestep and enable_timesteps in the affiner's config",
            )
    affiner.solve()


def _defaults(model: Any, settings: Settings) -> dict[str, Any]:
    """Return what every run is called with, of what the model's call takes."""
    call = model.forward if isinstance(model, nn.Module) else model
    taken = inspect.signature(call).parameters
    wanted = {"num_inference_steps": settings.max_timestep, "output_type": "latent"}
    return {key: value for key, value in wanted.items() if key in taken}


class _Lesson:
    """Shows an affiner what both denoisers say during one sampling run."""

    def __init__(self, affiner: AffinerProtocol, settings: Settings, quantized: nn.Module) -> None:
        self.steps: dict[float, int] = {}
        self.observed = 0
        self._affiner, self._settings, self._quantized = affiner, settings, quantized

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        timestep = timestep_of(module, args, kwargs, self._settings.timestep)
        step = self.steps.setdefault(timestep, len(self.steps))
        enabled = self._settings.enable_timesteps
        if step >= self._settings.max_timestep or (enabled is not None and step not in enabled):
            if isinstance(self._affiner, Affiner):
                self._affiner.skip(timestep)
            return
        real, quant = noise_of(output), noise_of(self._quantized(*args, **kwargs))
        part = target_part(real, self._settings.noise_target)
        self._affiner.observe(timestep, real[part], quant[part])
        self.observed += 1


def _open(path: Path) -> Affiner:
    what, hint = f"{path} is no saved affiner", "give a path that dump_path or save() wrote"
    try:
        open_regular(path).close()
    except ValidationError as error:
        raise CalibrationError(f"{what}: {error}", hint=hint) from error
    with foreign_errors(what, error=CalibrationError, hint=hint), safe_open(path, "pt") as file:
        header = parse_json((file.metadata() or {})[HEADER], "its description", error=CalibrationError)
        if header["version"] != 1:
            raise ValueError(f"version {header['version']}")
        try:
            affiner = make_affiner(parse_config(header["config"]))
        except ConfigurationError as error:
            raise CalibrationError(f"{what}: {error}", hint=hint) from error
        timesteps = [
            checked_number(each, "a timestep", error=CalibrationError) for each in header["timesteps"]
        ]
        solutions = {
            checked_number(timestep, "a timestep", error=CalibrationError): _solution(file, place)
            for place, timestep in enumerate(header["solved"])
        }
        if timesteps != sorted(timesteps) or not solutions.keys() <= set(timesteps):
            raise ValueError("its timesteps do not rise, or are not those it corrects")
    affiner.restore(timesteps, solutions)
    return affiner


def _solution(file: Any, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    gain, bias = file.get_tensor(f"{place}.gain"), file.get_tensor(f"{place}.bias")
    fits = (
        gain.shape == bias.shape and gain.ndim >= 1 and gain.is_floating_point() and bias.is_floating_point()
    )
    if not (fits and gain.isfinite().all() and bias.isfinite().all()):
        raise ValueError(f"gain and bias of place {place} are no finite numbers of one shape")
    return gain, bias
