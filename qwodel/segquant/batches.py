"""Calibration batches as calls of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qwodel.exceptions import CalibrationError

__all__ = ["Call", "calls_of", "device_of", "run_call", "tensors_of"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def calls_of(batches: Iterable[Any]) -> list[Call]:
    """Each batch as a call.

    A batch is a tuple of positional arguments, a dictionary of keyword arguments, ``(args, kwargs)``,
    a tensor, or a list whose first item is a tuple or a dictionary.

    Raises:
        CalibrationError: there is no batch, or one is none of these.
    """
    calls = [_call(batch) for batch in batches]
    if not calls:
        raise CalibrationError(
            "the calibration data has no batches", hint="give at least one batch of inputs"
        )
    return calls


def _call(batch: Any) -> Call:
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if not isinstance(batch, tuple | list) or not batch:
        raise CalibrationError(
            f"a calibration batch is a {type(batch).__name__}",
            hint="give tuples (positional arguments), dictionaries (keywords) or (args, kwargs)",
        )
    if len(batch) == 2 and isinstance(batch[0], tuple | list) and isinstance(batch[1], Mapping):
        return tuple(batch[0]), dict(batch[1])
    if isinstance(batch[0], tuple | Mapping):
        return _call(batch[0])
    return tuple(batch), {}


def run_call(model: nn.Module, call: Call) -> Any:
    """Run the model on a call, moved to the model's device."""
    device = device_of(model)
    args, kwargs = call
    return model(
        *(_to(each, device) for each in args), **{key: _to(each, device) for key, each in kwargs.items()}
    )


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in what a model returned."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            yield from tensors_of(each)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU if it has none."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(each, device) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_to(each, device) for each in value)
    return value
