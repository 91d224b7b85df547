"""Small diffusers pipelines with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

__all__ = ["dit_pipeline", "flux_pipeline", "unet_pipeline"]


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unet_pipeline(scheduler: Any = None, seed: int = 0) -> Any:
    """DDIM over a U-Net; ``unet`` is called with the timestep as second positional argument."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    return _quiet(diffusers.DDIMPipeline(unet.eval(), scheduler or diffusers.DDIMScheduler()))


def dit_pipeline(scheduler: Any = None, seed: int = 0) -> Any:
    """DiT with classifier-free guidance; the timestep is a keyword argument."""
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8,
    )  # fmt: skip
    scheduler = scheduler or diffusers.DPMSolverMultistepScheduler()
    return _quiet(diffusers.DiTPipeline(transformer.eval(), vae.eval(), scheduler))


def flux_pipeline(seed: int = 0) -> Any:
    """Flux on prompt embeddings: keyword arguments, tokens instead of images, a tuple as output."""
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, shift_factor=0.0
    )
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return _quiet(diffusers.FluxPipeline(scheduler, vae.eval(), None, None, None, None, transformer.eval()))
