"""Affiners on real (small) diffusers pipelines: held-out trajectories, attaching, saving, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from qwodel.segquant import (
    BlockwiseAffiner,
    PTQDAffiner,
    TACAffiner,
    load_affiner,
)
from tests.segquant.pipelines import diffusers, unet_pipeline

STEPS = 8


def _rounded(denoiser: nn.Module, bits: int) -> nn.Module:
    """A copy with its weights rounded to ``bits``, each tensor to one scale."""
    copied = copy.deepcopy(denoiser)
    with torch.no_grad():
        for module in copied.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                scale = module.weight.abs().max() / (2 ** (bits - 1) - 1)
                module.weight.copy_((module.weight / scale).round() * scale)
    return copied


def _with_unet(pipeline: Any, unet: nn.Module) -> Any:
    return type(pipeline)(unet, copy.deepcopy(pipeline.scheduler))


def _config(kind: str = "blockwise", **changes: Any) -> dict[str, Any]:
    solver = changes.pop("solver_config", {})
    extra = changes.pop("extra_args", {})
    settings = {"max_timestep": STEPS, "solver_config": solver, **changes}
    return {"type": kind, "config": settings, "extra_args": extra}


class Sampling:
    """DDIM from given latents, as a user's own sampler would do it."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser
        self.scheduler = diffusers.DDIMScheduler(clip_sample=False)

    def __call__(self, latents: torch.Tensor, num_inference_steps: int = STEPS) -> torch.Tensor:
        self.scheduler.set_timesteps(num_inference_steps)
        with torch.no_grad():
            for t in self.scheduler.timesteps:
                latents = self.scheduler.step(self.denoiser(latents, t).sample, t, latents).prev_sample
        return latents


@pytest.fixture(scope="module")
def models() -> tuple[Sampling, Sampling]:
    unet = unet_pipeline().unet
    return Sampling(unet), Sampling(_rounded(unet, 4))


def _sqnr(real: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(real.square().sum() / (real - other).square().sum()))


def _held_out(real: Sampling, quant: Sampling) -> float:
    latents = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    return _sqnr(real(latents), quant(latents))


def _latents(runs: int = 8) -> list[torch.Tensor]:
    return list(torch.randn(runs, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def _learn(models: tuple[Sampling, Sampling], kind: str = "blockwise", **changes: Any) -> Any:
    items: list[tuple[()]] = [()] * 8
    return load_affiner(_config(kind, **changes), items, *models, latents=_latents())


@pytest.mark.parametrize(
    ("kind", "solver", "expected", "gain"),
    [
        ("blockwise", {"sample_mode": "block"}, BlockwiseAffiner, 3.0),
        ("blockwise", {"sample_mode": "interpolate"}, BlockwiseAffiner, 3.0),
        ("blockwise", {"blocksize": 4}, BlockwiseAffiner, 3.0),
        ("ptqd", {}, PTQDAffiner, 3.0),
        ("tac", {}, TACAffiner, 0.0),
    ],
)
def test_held_out_trajectories_come_nearer(
    models: tuple[Sampling, Sampling], kind: str, solver: dict[str, Any], expected: type, gain: float
) -> None:
    real, quant = models
    before = _held_out(real, quant)
    affiner = _learn(models, kind, solver_config=solver)
    assert type(affiner) is expected
    assert len(affiner.timesteps) == STEPS
    with affiner.attach(quant):
        after = _held_out(real, quant)
    print(kind, solver, before, after)
    assert after >= before + gain
    assert _held_out(real, quant) == before  # nothing stays behind
    assert not real.denoiser._forward_hooks
