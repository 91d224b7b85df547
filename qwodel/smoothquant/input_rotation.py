"""Rotating what layers read, at run time: for models whose weights are rotated alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from qwodel.algorithms.hadamard import convrot_weight
from qwodel.smoothquant.scheme import Scheme
from qwodel.smoothquant.simulate import quantizable_layers

__all__ = ["rotate_inputs", "rotated"]


@contextmanager
def rotated(model: nn.Module, scheme: Scheme) -> Iterator[None]:
    """Rotate weights for good, and inputs while the block runs."""
    for layer in quantizable_layers(model).values():
        size = scheme.rotation(_columns(layer))
        if size and isinstance(layer.weight, nn.Parameter):
            layer.weight.data = convrot_weight(layer.weight.data, size)
    undo = rotate_inputs(model, scheme)
    try:
        yield
    finally:
        undo()


def rotate_inputs(model: nn.Module, scheme: Scheme) -> Callable[[], None]:
    """Rotate the inputs of all quantizable layers by forward pre-hooks; return what removes these."""
    hooks = [
        layer.register_forward_pre_hook(partial(_rotate_input, size))
        for layer in quantizable_layers(model).values()
        if (size := scheme.rotation(_columns(layer)))
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo


def _rotate_input(size: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = args[0]
    return (convrot_weight(x.reshape(-1, x.shape[-1]), size).reshape(x.shape).to(x.dtype), *args[1:])


def _columns(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[1]
