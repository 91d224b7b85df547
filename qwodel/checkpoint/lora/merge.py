"""Merging LoRA updates into weights: W + Σ scaleₖ·0.9ᵏ·(αₖ/rₖ)·BₖAₖ.

LoRA: https://arxiv.org/abs/2106.09685. A convolution's update is the product of
its flattened halves, shaped like the kernel.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.lora.keys import open_lora
from qwodel.checkpoint.lora.match import match_layers
from qwodel.exceptions import ValidationError

__all__ = [
    "DAMPENING",
    "LoraSource",
    "LoraTerm",
    "load_lora_for_merging",
    "load_lora_tensors",
    "merge_lora_into_weight",
    "merge_multiple_loras",
    "plan_merges",
]

DAMPENING = 0.9
"""The k-th of several LoRAs, counted from 0, has its update multiplied by this to the power k."""


@dataclass(frozen=True, slots=True)
class LoraSource:
    """A LoRA file (or PEFT directory) to merge before quantization, and its strength."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LoraTerm:
    """One LoRA's update of one weight; opens its file only when rows are asked for.

    Attributes:
        path: the LoRA file.
        down, up: keys of its two halves.
        factor: scale · dampening · α/rank.
        transposed: the weight is stored ``[in, out]``.
    """

    path: Path
    down: str
    up: str
    factor: float
    transposed: bool = False

    def add_rows(self, weight: torch.Tensor, start: int, stop: int) -> None:
        """Add rows ``[start, stop)`` of the update to ``weight``, fp32 and holding just those rows."""
        with UnifiedSafetensorsLoader(self.path, low_memory=True) as reader:
            down, up = reader.get_tensor(self.down).float(), reader.get_tensor(self.up).float()
        left, right = up.flatten(1), down.flatten(1)
        if self.transposed:
            left, right = right.T, left.T
        delta = left[start:stop] @ right
        weight.add_(delta.reshape(weight.shape), alpha=self.factor)


def plan_merges(
    loras: Sequence[LoraSource], shapes: Mapping[str, tuple[int, ...]], *, dampen: bool, allow_unmatched: bool
) -> tuple[dict[str, tuple[LoraTerm, ...]], list[str]]:
    """Find the weights that ``loras`` update.

    Args:
        loras: in the order of merging.
        shapes: shape of every base tensor, by name, in file order.
        dampen: count the k-th LoRA :data:`DAMPENING` to the power k.
        allow_unmatched: skip LoRA layers that fit no weight, unless none fits.

    Returns:
        Weight name → its updates in order, and the LoRA layers that were skipped.

    Raises:
        ValidationError: layers fit no weight, or one of another shape.
    """
    terms: dict[str, list[LoraTerm]] = {}
    skipped: list[str] = []
    for index, source in enumerate(loras):
        lora = open_lora(source.path)
        matched, unmatched = match_layers(lora, shapes)
        if unmatched and (not allow_unmatched or not matched):
            listed = ", ".join(unmatched[:8]) + (" …" if len(unmatched) > 8 else "")
            raise ValidationError(
                f"{lora.path}: {len(unmatched)} of {len(lora.layers)} LoRA layers fit no weight: {listed}",
                hint="check that it belongs to this base model, or allow unmatched layers",
            )
        skipped += [f"{lora.path.name}: {name}" for name in unmatched]
        strength = source.scale * (DAMPENING**index if dampen else 1.0)
        for target, layer in matched.items():
            factor = strength * layer.alpha / layer.rank
            terms.setdefault(target, []).append(
                LoraTerm(lora.path, layer.down, layer.up, factor, lora.transposed)
            )
    return {name: tuple(each) for name, each in terms.items()}, skipped


def load_lora_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Return layer name → A, the ``[rank, in, …]`` half whose rows span the inputs the LoRA reacts to."""
    return {name: layer["lora_A"] for name, layer in load_lora_for_merging(path).items()}


def load_lora_for_merging(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Return layer name → ``lora_A`` ``[rank, in, …]``, ``lora_B`` ``[out, rank, …]``, ``alpha``, ``rank``.

    Layers are named as in the file, without the LoRA suffix.

    Raises:
        ValidationError: the file has no LoRA layers or is another method's.
    """
    lora = open_lora(Path(path))
    with UnifiedSafetensorsLoader(lora.path, low_memory=True) as reader:
        return {
            layer.name: {
                "lora_A": reader.get_tensor(layer.down),
                "lora_B": reader.get_tensor(layer.up),
                "alpha": layer.alpha,
                "rank": layer.rank,
            }
            for layer in lora.layers
        }


def merge_lora_into_weight(
    weight_tensor: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    alpha: float | None,
    rank: int,
    scale: float = 1.0,
) -> torch.Tensor:
    """Return W + scale·(α/rank)·BA, computed in fp32, in the dtype of ``weight_tensor``.

    Args:
        weight_tensor: ``[out, in]``, or ``[out, in, kh, kw]`` of a convolution.
        lora_A: ``[rank, in]`` or ``[rank, in, kh, kw]``.
        lora_B: ``[out, rank]`` or ``[out, rank, 1, 1]``.
        alpha: ``None`` means the rank.

    Raises:
        ValidationError: the shapes do not fit.
    """
    return merge_multiple_loras(
        weight_tensor, [{"lora_A": lora_A, "lora_B": lora_B, "alpha": alpha, "rank": rank, "scale": scale}]
    )


def merge_multiple_loras(
    weight_tensor: torch.Tensor, lora_configs: Sequence[Mapping[str, Any]], dampen: bool = True
) -> torch.Tensor:
    """Return W + Σ 0.9ᵏ·scaleₖ·(αₖ/rankₖ)·BₖAₖ, computed in fp32, in the dtype of ``weight_tensor``.

    Args:
        weight_tensor: ``[out, in]`` or ``[out, in, kh, kw]``.
        lora_configs: mappings with ``lora_A``, ``lora_B`` and, optionally, ``alpha``,
            ``rank`` and ``scale``; the first is not dampened.
        dampen: multiply the k-th update by 0.9ᵏ.

    Raises:
        ValidationError: the shapes do not fit.
    """
    merged = weight_tensor.float().clone()
    for index, config in enumerate(lora_configs):
        down, up = config["lora_A"].float().flatten(1), config["lora_B"].float().flatten(1)
        rank = int(config.get("rank") or down.shape[0])
        alpha = config.get("alpha")
        factor = float(config.get("scale", 1.0)) * (rank if alpha is None else float(alpha)) / rank
        factor *= DAMPENING**index if dampen else 1.0
        if up.shape[1] != down.shape[0] or up.shape[0] * down.shape[1] != merged.numel():
            raise ValidationError(
                f"a LoRA of {list(up.shape)}·{list(down.shape)} does not fit a weight of {list(weight_tensor.shape)}"
            )
        merged.add_((up @ down).reshape(merged.shape), alpha=factor)
    return merged.to(weight_tensor.dtype)
