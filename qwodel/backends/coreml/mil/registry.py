"""The table of operations the evaluator knows: MIL name → function of keyword arguments.

A function gets tensors (floating ones in float32), text for text constants and lists for
variadic parameters; it returns a tensor or, with several outputs, a list of tensors.
Meanings are those of coremltools' MIL operation reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["NO_EFFECT", "OPERATIONS", "flag", "integers", "operation"]

NO_EFFECT = frozenset({"validate_indices", "output_dtype"})
"""Parameters that do not change values; they are not passed on."""

OPERATIONS: dict[str, Callable[..., Any]] = {}


def operation(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function under one or more MIL operation names."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            OPERATIONS[name] = function
        return function

    return register


def integers(value: torch.Tensor | None, default: list[int] | None = None) -> list[int]:
    """Return an integer tensor of any rank as a flat list."""
    if value is None:
        return list(default or [])
    return [int(each) for each in value.reshape(-1).tolist()]


def flag(value: torch.Tensor | None, default: bool = False) -> bool:
    """Return a scalar boolean constant."""
    return default if value is None else bool(value)
