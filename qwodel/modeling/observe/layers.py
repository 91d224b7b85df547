"""Which modules are watched, and what those read that hold many weights in one parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from qwodel.exceptions import ValidationError

__all__ = ["LayerId", "expert_inputs", "first_input", "is_fused_experts", "is_linear", "layers_to_record"]

LayerId = tuple[str, int | None]
"""A parameter's name and, where it holds many experts, the number of one."""


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies its input's last axis with one matrix called ``weight``."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_fused_experts(module: nn.Module) -> bool:
    """Whether the module holds experts as ``gate_up_proj`` and ``down_proj`` of three dimensions."""
    shapes = [getattr(getattr(module, name, None), "ndim", 0) for name in ("gate_up_proj", "down_proj")]
    return shapes == [3, 3] and hasattr(module, "act_fn")


def layers_to_record(model: nn.Module, parameters: Iterable[str]) -> dict[str, nn.Module]:
    """The linear and fused-expert modules of ``model`` that own one of ``parameters``, by name."""
    wanted = set(parameters)

    def owns(name: str, module: nn.Module) -> bool:
        if is_fused_experts(module):
            return bool(wanted & {f"{name}.gate_up_proj", f"{name}.down_proj"})
        return is_linear(module) and (f"{name}.weight" if name else "weight") in wanted

    return {name: module for name, module in model.named_modules() if owns(name, module)}


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str = "a layer") -> torch.Tensor:
    """The tensor that the layer called ``name`` is called with.

    Raises:
        ValidationError: it is called with something else.
    """
    value = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(value, torch.Tensor):
        raise ValidationError(f"{name} is called with a {type(value).__name__} in place of a tensor")
    return value


def expert_inputs(
    module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield what each of fused experts reads: parameter, number of the expert, ``[tokens, N]``.

    Experts that no token is routed to are left out.
    """
    hidden, chosen = [*args, *kwargs.values()][:2]
    flat = hidden.reshape(-1, hidden.shape[-1])
    for expert in range(module.gate_up_proj.shape[0]):
        tokens = (chosen == expert).any(dim=-1).nonzero().flatten()
        if not len(tokens):
            continue
        inputs = flat[tokens]
        yield "gate_up_proj", expert, inputs
        yield "down_proj", expert, _between(module, inputs, expert)


def _between(module: Any, inputs: torch.Tensor, expert: int) -> torch.Tensor:
    """What an expert's down projection reads."""
    weight = module.gate_up_proj[expert]
    product = inputs @ (weight.T if weight.shape[1] == inputs.shape[1] else weight)
    if hasattr(module, "_apply_gate"):
        gated: torch.Tensor = module._apply_gate(product)  # noqa: SLF001  (the architecture's own gate)
        return gated
    gate, up = product.chunk(2, dim=-1)
    between: torch.Tensor = module.act_fn(gate) * up
    return between
