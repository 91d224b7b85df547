"""What the layers of a model read: greatest values a channel, and a sample of the inputs themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qwodel.modeling.observe.layers import is_fused_experts, is_linear
from qwodel.modeling.observe.peaks import GreatestValues, TokenSamples
from qwodel.modeling.observe.watcher import Watcher

__all__ = ["ActivationStatistics", "observe_activations", "watched_layers"]


@dataclass(slots=True)
class ActivationStatistics:
    """What layers read on calibration data.

    Attributes:
        peaks: layer → greatest absolute value of each input channel, fp32 ``[N]`` on the CPU.
        samples: layer → inputs of tokens spread over the data, fp32 ``[tokens, N]``; those of layers
            that read the same tensor are one tensor.
    """

    peaks: dict[str, torch.Tensor] = field(default_factory=dict)
    samples: dict[str, torch.Tensor] = field(default_factory=dict)


def watched_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers, Conv1D, stacked experts and routers (modules with a matrix ``weight``), by name."""

    def reads_vectors(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        router = isinstance(weight, nn.Parameter) and weight.ndim == 2 and "Router" in type(module).__name__
        return is_linear(module) or is_fused_experts(module) or router

    return {name: module for name, module in model.named_modules() if reads_vectors(module)}


@contextmanager
def observe_activations(
    model: nn.Module, *, tokens_per_batch: int = 0, statistics: ActivationStatistics | None = None
) -> Iterator[Watcher]:
    """Record what layers read while the block runs; call ``batch(mask)`` before each forward pass.

    Args:
        model: runs in the block.
        tokens_per_batch: tokens of each batch to keep of every layer; none where 0.
        statistics: filled; complete once the block is left.

    Raises:
        ValidationError: a layer reads NaN or Inf.
    """
    statistics = statistics if statistics is not None else ActivationStatistics()
    layers = watched_layers(model)
    # A pair names stacked experts by the parameter that reads.
    names = {
        name: (name, f"{name}.gate_up_proj") for name, module in layers.items() if is_fused_experts(module)
    }
    peaks, samples = GreatestValues(statistics.peaks, names), TokenSamples(tokens_per_batch, names)
    with Watcher(layers, peaks, *([samples] if tokens_per_batch else [])) as watcher:
        yield watcher
    statistics.samples |= samples.result()


def mask_of(batch: Any) -> torch.Tensor | None:
    """The attention mask of a batch, where it has one of two dimensions."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
