"""Devices, memory, seeds and file names for scripts around the converter."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from qwodel.exceptions import ConfigurationError, did_you_mean

__all__ = ["clean_gpu_memory", "generate_output_filename", "get_device", "setup_seed"]


def get_device() -> str:
    """``"cuda"`` if there is a CUDA device, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def clean_gpu_memory(device: str | None = None) -> None:
    """Collect garbage and give cached GPU memory back to the driver.

    Args:
        device: the device to clean; ``None`` is the current one. On a CPU only garbage is collected.
    """
    gc.collect()
    if torch.cuda.is_available() and (device is None or torch.device(device).type == "cuda"):
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def setup_seed(seed: int, device: str | None = None) -> torch.Generator:
    """Seed torch's global generators and return a generator of its own with the same seed.

    Args:
        seed: any 64-bit integer; −1 is a seed like any other.
        device: where the generator lives; ``None`` is torch's default device.
    """
    torch.manual_seed(seed)
    return torch.Generator(device or torch.get_default_device()).manual_seed(seed)


def generate_output_filename(
    input_file: str, target_dtype: torch.dtype, scaling_mode: str, **kwargs: Any
) -> str:
    """A file name that tells how it was made, beside the input file.

    ``model.safetensors`` with ``min_k=1, max_k=16, top_p=0.01`` becomes
    ``model_float8_e4m3fn_block_k1-16_p0.01.safetensors``.

    Args:
        input_file: path of the source.
        target_dtype: dtype of the weights.
        scaling_mode: ``"tensor"``, ``"row"`` or ``"block"``.
        **kwargs: any of ``block_size``, ``min_k`` with ``max_k``, ``top_p``, ``num_iter``,
            ``optimizer``, ``lr``.

    Raises:
        ConfigurationError: an unknown keyword, or one of ``min_k`` and ``max_k`` alone.
    """
    known = ("block_size", "min_k", "max_k", "top_p", "num_iter", "optimizer", "lr")
    for name in kwargs:
        if name not in known:
            raise ConfigurationError(f"{name!r} has no place in a file name", hint=did_you_mean(name, known))
    if ("min_k" in kwargs) != ("max_k" in kwargs):
        raise ConfigurationError("min_k and max_k go into a file name together")
    parts = [Path(input_file).stem, str(target_dtype).removeprefix("torch."), scaling_mode]
    if "block_size" in kwargs:
        parts.append(f"bs{kwargs['block_size']}")
    if "min_k" in kwargs:
        parts.append(f"k{kwargs['min_k']}-{kwargs['max_k']}")
    labels = {"top_p": "p", "num_iter": "it", "optimizer": "", "lr": "lr"}
    parts += [f"{label}{kwargs[name]}" for name, label in labels.items() if name in kwargs]
    return str(Path(input_file).with_name("_".join(parts) + ".safetensors"))
