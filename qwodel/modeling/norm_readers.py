"""Which layers read exactly what a norm gives, seen in one run with hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["find_norm_readers"]


def find_norm_readers(
    model: nn.Module,
    run: Callable[[], object],
    *,
    is_norm: Callable[[nn.Module], bool],
    is_reader: Callable[[nn.Module], bool],
) -> tuple[dict[str, list[str]], list[str]]:
    """Run a model and watch where the outputs of norms go, by their addresses.

    Args:
        run: runs the model once.
        is_norm, is_reader: which modules count as what; a norm is no reader.

    Returns:
        norm → its readers, and the readers of floating-point tensors that no norm gave.
    """
    produced: dict[tuple[int, int], str] = {}
    alive: list[torch.Tensor] = []  # so that no address is used twice
    readers: dict[str, list[str]] = {}
    others: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if is_norm(module) and isinstance(output, torch.Tensor):
                alive.append(output)
                produced[output.data_ptr(), output.numel()] = name
            elif is_reader(module):
                value = args[0] if args else next(iter(kwargs.values()), None)
                if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                    return
                norm = produced.get((value.data_ptr(), value.numel()))
                (others if norm is None else readers.setdefault(norm, [])).append(name)

        return hook

    hooks = [
        module.register_forward_hook(watch(name, module), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        run()
    finally:
        for each in hooks:
            each.remove()
    return readers, others
