"""Small checkpoints for these tests, and one call from checkpoint to verified output."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwodel.checkpoint.formats.registry import CODECS, storage_format
from qwodel.checkpoint.layouts.comfyui import ComfyUILayout
from qwodel.checkpoint.layouts.layout import Layout
from qwodel.checkpoint.plan.planning import build_plan
from qwodel.checkpoint.plan.recipe import Recipe
from qwodel.checkpoint.run.convert import Conversion, convert_checkpoint
from qwodel.checkpoint.run.device_executor import make_executor
from qwodel.checkpoint.run.verify import verify
from qwodel.report import TensorQuality

FORMATS = [
    name for name, each in CODECS.items() if each.quant_type and not each.quant_type.power_of_two_scales
]
"""Formats with fp32 scales, which take every shape."""


def random_weights(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for name, shape in shapes.items()
    }


DATA = Path(os.environ.get("QWODEL_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
"""Real weights, where they have been laid out; tests that need them skip elsewhere."""

LLAMA_LAYER = {
    "self_attn.q_proj.weight": (64, 48),
    "self_attn.o_proj.weight": (48, 64),
    "mlp.gate_proj.weight": (96, 48),
    "mlp.down_proj.weight": (48, 96),
    "input_layernorm.weight": (48,),
}


def llama_weights(layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (100, 48), "lm_head.weight": (100, 48)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in LLAMA_LAYER.items()}
    return random_weights(shapes, dtype)


def save_sharded(folder: Path, weights: dict[str, torch.Tensor], shards: int, *, index: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = list(weights)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[number::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if index:
        document = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def run(
    source: Path, destination: Path, layout: Layout | None = None, workers: int = 1, **recipe: Any
) -> tuple[Conversion, dict[str, TensorQuality]]:
    """Plan, convert and verify; ``format`` in ``recipe`` is a name."""
    name = recipe.pop("format", "int8_row")
    size = recipe.pop("block_size", None)
    layout = layout or ComfyUILayout()
    plan = build_plan(source, Recipe(format=storage_format(name, size), **recipe), layout)
    if not layout.single_file:
        destination.mkdir(parents=True, exist_ok=True)
    conversion = convert_checkpoint(plan, destination, executor=make_executor(workers))
    return conversion, {quality.name: quality for quality in verify(conversion)}


def sqnr(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    reference, approximation = reference.double(), approximation.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - approximation).square().sum()))
