"""Rotating value heads: an exact fold, because attention only mixes tokens and never a head's channels.

With H orthogonal, ``W_v → H W_v`` and ``W_o → W_o Hᵀ`` in every head leave the function as it was,
and spread what is large in one channel over the head (Ashkboos et al., https://arxiv.org/abs/2404.00456).
"""

from __future__ import annotations

import torch
from torch import nn

from qwodel.algorithms.hadamard import walsh_hadamard
from qwodel.exceptions import ConfigurationError
from qwodel.modeling.pairs import Pair, input_weight, output_weight
from qwodel.modeling.wiring_table import ProducerKind

__all__ = ["can_rotate_heads", "rotate_heads", "rotate_last_axis"]


def can_rotate_heads(pair: Pair) -> bool:
    """Whether the pair is a value projection whose heads are a power of two wide."""
    size = pair.head_dim
    return pair.kind is ProducerKind.VALUE and size > 1 and not size & (size - 1)


@torch.no_grad()
def rotate_heads(model: nn.Module, pair: Pair) -> None:
    """Rotate each value head by a Walsh–Hadamard transform, and what reads it back, in place.

    Raises:
        ConfigurationError: the pair has no heads that a power of two wide.
    """
    if not can_rotate_heads(pair):
        raise ConfigurationError(f"{pair.producer} has no value heads a power of two wide")
    weight, axis = output_weight(model, pair.producer)
    bias = getattr(model.get_submodule(pair.producer), "bias", None)
    outputs = slice(*pair.outputs)
    for parameter, place in ((weight, axis), (bias, 0)):
        if isinstance(parameter, nn.Parameter):
            part = parameter.movedim(place, -1)[..., outputs]
            part.copy_(rotate_last_axis(part, pair.head_dim))
    for name in pair.consumers:
        consumer, axis = input_weight(model, name)
        view = consumer.movedim(axis, -1)
        view.copy_(rotate_last_axis(view, pair.head_dim))


def rotate_last_axis(x: torch.Tensor, size: int) -> torch.Tensor:
    """Rotate each ``size`` neighbours of the last axis; computed in fp64, returned in the dtype of ``x``."""
    return walsh_hadamard(x.double().reshape(*x.shape[:-1], -1, size)).reshape(x.shape).to(x.dtype)
