"""The value object of the wiring: a producer, and everything that reads what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qwodel.exceptions import ValidationError
from qwodel.modeling.wiring_table import ProducerKind

__all__ = ["Pair", "input_weight", "make_pair", "output_weight"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A layer and *all* readers of its output, so that scales can move from one to the other.

    Names are those of ``model.named_modules()``; a consumer may also be a parameter of stacked
    experts. ``channels`` is the number of scales. ``outputs`` is the range of the producer's
    outputs they belong to: all of them, or the value or up part of a fused layer.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: ProducerKind
    channels: int
    outputs: tuple[int, int]
    head_dim: int = 0
    groups: int = 1
    """Query heads per key-value head; of VALUE pairs."""

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """Return one scale per consumer input: value heads are repeated as attention repeats them."""
        if self.groups == 1:
            return scales
        return scales.reshape(-1, self.head_dim).repeat_interleave(self.groups, 0).reshape(-1)


def input_weight(model: nn.Module, name: str) -> tuple[nn.Parameter, int]:
    """Return the weight of a consumer and the axis along which its inputs lie.

    ``name`` is a linear layer, a transformers ``Conv1D``, a router with a matrix ``weight``, or a
    parameter of stacked experts ``[experts, outputs, inputs]``.

    Raises:
        ValidationError: it is none of these.
    """
    parent, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(parent), leaf, None)
    if isinstance(found, nn.Parameter):
        return found, found.ndim - 1
    weight = getattr(found, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.ndim == 2:
        return weight, 0 if type(found).__name__ == "Conv1D" else 1
    raise ValidationError(f"{name} has no weight matrix that scales could go into")


def output_weight(model: nn.Module, name: str) -> tuple[nn.Parameter, int]:
    """Return the weight of a producing linear layer and the axis along which its outputs lie."""
    weight, inputs = input_weight(model, name)
    return weight, weight.ndim - 2 if inputs == weight.ndim - 1 else weight.ndim - 1


def make_pair(
    model: nn.Module, producer: str, consumers: tuple[str, ...], kind: ProducerKind, config: Any
) -> Pair:
    """Return the pair with its sizes, from the layers' shapes and the model's head counts.

    Raises:
        ValidationError: the shapes do not fit together.
    """
    inputs = {weight.shape[axis] for weight, axis in (input_weight(model, name) for name in consumers)}
    columns = inputs.pop()
    if inputs:
        raise ValidationError(f"the layers that read {producer} differ in columns: {', '.join(consumers)}")
    if kind in (ProducerKind.NORM, ProducerKind.NORM_PLUS_ONE):
        return Pair(producer, consumers, kind, columns, (0, columns))
    weight, axis = output_weight(model, producer)
    rows = weight.shape[axis]
    if kind is ProducerKind.LINEAR:
        channels, head_dim, groups = columns, 0, 1
    else:
        heads = int(config.num_attention_heads)
        head_dim = columns // heads
        groups = heads // int(getattr(config, "num_key_value_heads", None) or heads)
        channels = columns // groups
    if rows < channels:
        raise ValidationError(f"{producer} has {rows} outputs, and {consumers[0]} takes {columns}")
    # In fused layers the value part, or the up part, comes last.
    return Pair(producer, consumers, kind, channels, (rows - channels, rows), head_dim, groups)
