"""Affiners on real (small) diffusers pipelines: held-out trajectories, attaching, saving, errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qwodel.exceptions import CalibrationError, ConfigurationError, ValidationError
from qwodel.segquant import (
    BlockwiseAffiner,
    PTQDAffiner,
    TACAffiner,
    attach_affiner,
    load_affiner,
)
from tests.segquant.pipelines import diffusers, dit_pipeline, flux_pipeline, unet_pipeline

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


def _learn(models: tuple[Sampling, Sampling], kind: str = "blockwise", runs: int = 2, **changes: Any) -> Any:
    items: list[tuple[()]] = [()] * runs
    return load_affiner(_config(kind, **changes), items, *models, latents=_latents(runs))


@pytest.mark.parametrize(
    ("kind", "solver", "expected", "gain"),
    [
        ("blockwise", {"sample_mode": "block"}, BlockwiseAffiner, 0.5),
        ("blockwise", {"sample_mode": "interpolate"}, BlockwiseAffiner, 0.5),
        ("blockwise", {"blocksize": 4}, BlockwiseAffiner, 0.5),
        ("ptqd", {}, PTQDAffiner, 0.5),
        ("tac", {}, TACAffiner, 0.2),
    ],
)
def test_held_out_trajectories_come_nearer(
    models: tuple[Sampling, Sampling], kind: str, solver: dict[str, Any], expected: type, gain: float
) -> None:
    real, quant = models
    before = _held_out(real, quant)
    affiner = _learn(models, kind, runs=8, solver_config=solver)
    assert type(affiner) is expected
    assert len(affiner.timesteps) == STEPS
    with affiner.attach(quant):
        after = _held_out(real, quant)
    assert after >= before + gain
    assert _held_out(real, quant) == before  # nothing stays behind
    assert not real.denoiser._forward_hooks


def _identities() -> tuple[Sampling, Sampling]:
    from diffusers.models.unets.unet_2d import UNet2DOutput

    class Identity(nn.Module):
        def forward(self, sample: torch.Tensor, timestep: Any) -> Any:
            return UNet2DOutput(sample=sample)

    return Sampling(Identity()), Sampling(Identity())


def test_a_good_denoiser_is_left_alone(models: tuple[Sampling, Sampling]) -> None:
    real, _ = models
    affiner = _learn((real, Sampling(copy.deepcopy(real.denoiser))))
    noise = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(affiner.correct(affiner.timesteps[2], noise), noise, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("second", "shift"), [(0.3, 0.4 * 0.88), (-0.3, 0.0)])
def test_only_an_error_that_both_halves_share_is_corrected(second: float, shift: float) -> None:
    """What either half teaches serves the other best at a share of (0.5·e + e·0.5)/(0.5² + e²), here 0.88."""
    affiner = load_affiner(_config(), [()], *_identities(), latents=_latents(1))
    generator = torch.Generator().manual_seed(0)
    for run, error in enumerate((0.5, second)):
        real = torch.randn(64, 3, 8, 8, generator=generator)
        affiner.start_run(run)
        affiner.observe(10.0, real, real + error)
    affiner.solve()
    x = torch.randn(1, 3, 8, 8, generator=generator)
    change = affiner.correct(10.0, x) - x
    assert float(change.mean()) == pytest.approx(-shift, abs=0.02)
    if not shift:
        assert not change.any()


def test_both_models_are_given_the_same_latents(models: tuple[Sampling, Sampling]) -> None:
    real, quant = models
    seen: dict[str, list[torch.Tensor]] = {"real": [], "quant": []}
    handles = [
        model.denoiser.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name, model in (("real", real), ("quant", quant))
    ]
    load_affiner(_config(), [()], real, quant, latents=_latents(1))
    for handle in handles:
        handle.remove()
    assert len(seen["real"]) == len(seen["quant"]) == STEPS
    assert all(map(torch.equal, seen["real"], seen["quant"]))
    assert torch.equal(seen["real"][0], _latents(1)[0])


def test_only_the_steps_enabled_are_corrected(models: tuple[Sampling, Sampling]) -> None:
    affiner = _learn(
        models, max_timestep=5, enable_timesteps=[0, 3], extra_args={"num_inference_steps": STEPS}
    )
    assert affiner.timesteps == [0.0, 125.0, 250.0, 375.0, 500.0, 625.0, 750.0, 875.0]
    noise = torch.randn(1, 3, 8, 8)
    changed = [t for t in affiner.timesteps if not torch.equal(affiner.correct(t, noise), noise)]
    assert changed == [500.0, 875.0]
    assert torch.equal(affiner.correct(520, noise), affiner.correct(500, noise))
    assert torch.equal(affiner.correct(990, noise), affiner.correct(875, noise))
    assert torch.equal(affiner.correct(1200, noise), noise)


def test_percentile_and_scale_blend(models: tuple[Sampling, Sampling]) -> None:
    t, noise = 500.0, torch.randn(1, 3, 8, 8)
    full, half, none, weak, strong = (
        _learn(models, solver_config={"blocksize": 2, **solver}).correct(t, noise) - noise
        for solver in (
            {},
            {"scale": 0.5},
            {"scale": 0.0},
            {"percentile": 50.0},
            {"percentile": 50.0, "greater": True},
        )
    )
    torch.testing.assert_close(half, full / 2, atol=1e-6, rtol=1e-4)
    assert not none.any()
    touched = [(each != 0).float().mean().item() for each in (full, weak, strong)]
    assert touched == pytest.approx([1.0, 0.5, 0.5], abs=0.05)
    assert not ((weak != 0) & (strong != 0)).any()


def test_threshold_of_tac(models: tuple[Sampling, Sampling]) -> None:
    affiner = _learn(models, "tac", solver_config={"threshold": 1.0})
    noise = torch.randn(1, 3, 8, 8)
    changed = affiner.correct(500.0, noise) != noise
    assert torch.equal(changed, noise.abs() >= noise.abs().mean())


def test_saved_and_loaded(models: tuple[Sampling, Sampling], tmp_path: Path) -> None:
    path = tmp_path / "affiners" / "unet.safetensors"
    learned = load_affiner(
        _config(enable_timesteps=[1, 2]), [()] * 2, *models, latents=_latents(2), dump_path=path
    )
    loaded = load_affiner(path)
    assert type(loaded) is BlockwiseAffiner
    assert loaded.config == learned.config
    assert loaded.timesteps == learned.timesteps
    noise = torch.randn(2, 3, 16, 16)  # another resolution than it was learned at
    for t in learned.timesteps:
        assert torch.equal(loaded.correct(t, noise), learned.correct(t, noise))
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    (tmp_path / "other").write_bytes(b"text")
    for wrong in (tmp_path / "other", tmp_path / "nothing"):
        with pytest.raises(CalibrationError, match="is no saved affiner"):
            load_affiner(wrong)


@pytest.mark.parametrize(
    ("pipeline", "item", "extra"),
    [
        (unet_pipeline, {"batch_size": 2}, {}),
        (dit_pipeline, {"class_labels": [1, 2]}, {"guidance_scale": 3.0}),
        (
            flux_pipeline,
            {"prompt_embeds": torch.ones(1, 5, 16), "pooled_prompt_embeds": torch.ones(1, 12)},
            {"height": 16, "width": 16},
        ),
    ],
    ids=["DDIM", "DiT", "Flux"],
)
def test_pipelines_use_an_affiner_unchanged(
    pipeline: Any, item: dict[str, Any], extra: dict[str, Any]
) -> None:
    real, quant = pipeline(), pipeline()
    name = "unet" if hasattr(quant, "unet") else "transformer"
    rounded = _rounded(getattr(real, name), 4)
    setattr(quant, name, rounded)
    affiner = load_affiner(_config(max_timestep=3, extra_args=extra), [item] * 2, real, quant)
    assert len(affiner.timesteps) == 3
    taken: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        taken.append((rounded.forward(*args, **kwargs)[0].detach(), output[0].detach()))

    with affiner.attach(quant):
        handle = rounded.register_forward_hook(spy, with_kwargs=True)
        quant(**item, **extra, num_inference_steps=3)
        handle.remove()
    for t, (plain, corrected) in zip(sorted(affiner.timesteps, reverse=True), taken, strict=True):
        assert not torch.equal(plain, corrected)
        torch.testing.assert_close(corrected, affiner.correct(t, plain))


def test_halves_of_a_guided_batch() -> None:
    real, quant = dit_pipeline(), dit_pipeline()
    quant.transformer = _rounded(real.transformer, 3)
    args = torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), torch.tensor([1, 1000])
    named = dict(zip(("hidden_states", "timestep", "class_labels"), args, strict=True))
    with torch.no_grad():
        plain = quant.transformer(**named).sample
    for target, changed in (("uncond", [True, False]), ("text", [False, True]), ("all", [True, True])):
        affiner = load_affiner(
            _config(max_timestep=2, noise_target=target), [{"class_labels": [1]}], real, quant
        )
        with affiner.attach(quant), torch.no_grad():
            corrected = quant.transformer(**named).sample
            assert [not torch.equal(a, b) for a, b in zip(corrected, plain, strict=True)] == changed
            if target != "all":
                with pytest.raises(ValidationError, match=f"a batch of 1 has no {target} half"):
                    quant.transformer(**{key: value[:1] for key, value in named.items()})


class Constant:
    """A third party's affiner: the mean error, wherever it is."""

    def __init__(self) -> None:
        self.errors: dict[float, list[torch.Tensor]] = {}
        self.solved: dict[float, torch.Tensor] = {}

    def observe(self, timestep: float, real: torch.Tensor, quant: torch.Tensor) -> None:
        self.errors.setdefault(timestep, []).append((real - quant).mean())

    def solve(self) -> None:
        self.solved = {t: torch.stack(each).mean() for t, each in self.errors.items()}

    def correct(self, timestep: float, noise: torch.Tensor) -> torch.Tensor:
        return noise + self.solved[timestep]


def test_a_third_party_s_affiner(models: tuple[Sampling, Sampling], tmp_path: Path) -> None:
    real, quant = models
    mine = Constant()
    options: dict[str, Any] = {"latents": _latents(2), "thirdparty_affiner": mine}
    assert load_affiner(_config(), [()] * 2, real, quant, **options) is mine
    assert len(mine.solved) == STEPS
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        plain = quant.denoiser(x, 500).sample
        with attach_affiner(quant, mine):
            corrected = quant.denoiser(x, 500).sample
    torch.testing.assert_close(corrected, plain + mine.solved[500.0])
    with pytest.raises(ConfigurationError, match="Constant has no save"):
        load_affiner(_config(), [()], real, quant, thirdparty_affiner=mine, dump_path=tmp_path / "a")


class Unnamed(nn.Module):
    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return x * step.reshape(-1, 1, 1, 1)


def test_denoisers_and_timesteps_can_be_named() -> None:
    class Own:
        def __init__(self, factor: float) -> None:
            self.inner = nn.Module()
            self.inner.net = Unnamed()
            self.factor = factor

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner.net(self.inner.net(x, torch.tensor([2.0])), step=torch.tensor([3.0]))

    named = {"denoiser": "inner.net", "timestep": "step"}
    affiner = load_affiner(_config(**named), [torch.ones(1, 1, 2, 2)], Own(1), Own(1))
    assert affiner.timesteps == [2.0, 3.0]
    with pytest.raises(ConfigurationError, match="no argument of Unnamed is a timestep: x, step"):
        load_affiner(_config(denoiser="inner.net"), [torch.ones(1, 1, 2, 2)], Own(1), Own(1))
    with pytest.raises(ConfigurationError, match="Own has no denoiser 'inner.nat'"):
        load_affiner(_config(denoiser="inner.nat"), [torch.ones(1)], Own(1), Own(1))
    with pytest.raises(ConfigurationError, match="Own has no denoiser"):
        load_affiner(_config(), [torch.ones(1)], Own(1), Own(1))
    with affiner.attach(model := Own(1)), pytest.raises(ValidationError, match="several timesteps"):
        model.inner.net(torch.ones(2, 1, 2, 2), torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "linear"}, "affiner option 'type'"),
        ({"kind": "tac"}, "no option 'kind'"),
        ({"config": {"max_timesteps": 5}}, "no option 'config.max_timesteps'"),
        ({"config": {"recurrent": False}}, "'config.recurrent': both models are given the latents"),
        ({"config": {"enable_latent_affine": True}}, "latents belong to the scheduler"),
        ({"config": {"solver_type": "lstsq"}}, "affiner option 'config.solver_type'"),
        ({"config": {"solver_config": {"alpha": 2}}}, "affiner option 'solver_config.alpha'"),
        (
            {"type": "ptqd", "config": {"solver_config": {"blocksize": 8}}},
            "no option 'solver_config.blocksize'",
        ),
    ],
)
def test_bad_options(models: tuple[Sampling, Sampling], config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_affiner(config, [()], *models)
    assert caught.value.hint


def test_nothing_to_learn_from(models: tuple[Sampling, Sampling]) -> None:
    real, quant = models
    with pytest.raises(CalibrationError, match="data set is empty"):
        load_affiner(_config(), [], real, quant)
    with pytest.raises(CalibrationError, match="none of its steps is enabled"):
        load_affiner(_config(enable_timesteps=[77]), [()], real, quant, latents=_latents(1))
    with pytest.raises(CalibrationError, match="latents for 1 runs, and 2 items"):
        load_affiner(_config(), [()] * 2, real, quant, latents=_latents(1))
    with pytest.raises(ConfigurationError, match="the same denoiser"):
        load_affiner(_config(), [()], real, real)
    with pytest.raises(ConfigurationError, match="takes a data set and both models"):
        load_affiner(_config(), [()], real)
    with pytest.raises(ConfigurationError, match="not both"):
        load_affiner("path", [()], real, quant)
    sizes = [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 16, 16), torch.randn(1, 3, 8, 8)]
    with pytest.raises(CalibrationError, match="different sizes"):
        load_affiner(_config(), [()] * 3, real, quant, latents=sizes)
