"""What the layers of a model read: greatest values a channel, and a sample of the inputs themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from qwodel.exceptions import ValidationError
from qwodel.modeling.recorder import is_fused_experts, is_linear

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


@dataclass(slots=True)
class _Observer:
    statistics: ActivationStatistics
    tokens: int
    """Tokens sampled a batch and layer."""
    mask: torch.Tensor | None = None
    parts: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    recent: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def batch(self, mask: torch.Tensor | None) -> None:
        """Begin a batch; tokens where ``mask`` ``[batch, tokens]`` is zero do not count."""
        self.mask = None if mask is None or bool((mask != 0).all()) else mask != 0
        self.recent.clear()

    def see(
        self, names: tuple[str, ...], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        value = args[0] if args else next(iter(kwargs.values()))
        inputs = value.detach()
        if self.mask is not None:
            if inputs.shape[:-1] == self.mask.shape:
                inputs = inputs[self.mask.to(inputs.device)]
            elif inputs.shape[:-1] == (self.mask.numel(),):
                inputs = inputs[self.mask.reshape(-1).to(inputs.device)]
        rows = inputs.reshape(-1, inputs.shape[-1])
        if not len(rows):
            return
        peak = rows.abs().amax(dim=0).float().cpu()
        if not bool(peak.isfinite().all()):
            raise ValidationError(f"{names[0]} reads NaN or Inf", hint="calibrate in a wider dtype")
        peaks = self.statistics.peaks
        for name in names:
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak
        if self.tokens:
            sample = self._sample(value, rows)
            for name in names:
                self.parts.setdefault(name, []).append(sample)

    def _sample(self, value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        for tensor, sample in self.recent:
            if tensor is value:
                return sample
        # The first tokens are among them: they carry the greatest activations.
        places = torch.linspace(
            0, len(rows) - 1, min(self.tokens, len(rows)), dtype=torch.float32, device=rows.device
        ).long()
        sample = rows[places].float().cpu()
        self.recent = [*self.recent[-7:], (value, sample)]
        return sample

    def finish(self) -> None:
        joined: dict[tuple[int, ...], torch.Tensor] = {}
        for name, parts in self.parts.items():
            key = tuple(map(id, parts))
            if key not in joined:
                joined[key] = torch.cat(parts)
            self.statistics.samples[name] = joined[key]


@contextmanager
def observe_activations(
    model: nn.Module, *, tokens_per_batch: int = 0, statistics: ActivationStatistics | None = None
) -> Iterator[_Observer]:
    """Record what layers read while the block runs; call ``batch(mask)`` before each forward pass.

    Args:
        model: runs in the block.
        tokens_per_batch: tokens of each batch to keep of every layer; none where 0.
        statistics: filled; complete once the block is left.

    Raises:
        ValidationError: a layer reads NaN or Inf.
    """
    observer = _Observer(statistics if statistics is not None else ActivationStatistics(), tokens_per_batch)
    hooks = []
    for name, module in watched_layers(model).items():
        # A pair names stacked experts by the parameter that reads.
        names = (name, f"{name}.gate_up_proj") if is_fused_experts(module) else (name,)
        hooks.append(module.register_forward_pre_hook(partial(observer.see, names), with_kwargs=True))
    try:
        yield observer
        observer.finish()
    finally:
        for hook in hooks:
            hook.remove()


def mask_of(batch: Any) -> torch.Tensor | None:
    """The attention mask of a batch, where it has one of two dimensions."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
