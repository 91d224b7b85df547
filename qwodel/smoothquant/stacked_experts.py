"""Experts that transformers keeps in stacked parameters: which can be INT8, and how they would compute."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from qwodel.modeling.observe.layers import is_fused_experts
from qwodel.modules.int8_experts import gate_of, run_experts
from qwodel.smoothquant.fake_quant import fake_quantize

__all__ = ["EXPERT_WEIGHTS", "fake_quantized_experts", "stacked_experts"]

log = logging.getLogger(__name__)

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
_TOKENS = 6
_SAME = 1e-3


def stacked_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of stacked experts that are two products around a gate, by name.

    Where there are weights it is tried out; modules that compute something else are named in a warning.
    """
    found = {}
    for name, module in model.named_modules():
        if not is_fused_experts(module):
            continue
        if _is_plain(module) and (module.gate_up_proj.device.type == "meta" or _computes_so(module)):
            found[name] = module
        else:
            log.warning("the experts of %s compute in a way of their own and stay as they are", name)
    return found


def _is_plain(experts: Any) -> bool:
    """``[E, 2I, H]`` and ``[E, H, I]``, without biases."""
    (_, both, hidden), (_, outputs, inner) = experts.gate_up_proj.shape, experts.down_proj.shape
    names = {name for name, _ in experts.named_parameters()}
    return names == set(EXPERT_WEIGHTS) and (both, outputs) == (2 * inner, hidden)


@torch.no_grad()
def _computes_so(experts: Any) -> bool:
    weight = experts.gate_up_proj
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_TOKENS, weight.shape[2], generator=generator, dtype=torch.float32).to(weight)
    chosen = (torch.arange(_TOKENS) % len(weight))[:, None].to(weight.device)
    counts = torch.full((_TOKENS, 1), 0.5, dtype=torch.float32).to(weight)
    expected = experts(hidden, chosen, counts).float()
    found = _forward(experts, None, hidden, chosen, counts).float()
    # Narrow dtypes round sums in another order.
    slack = max(_SAME, 8 * torch.finfo(weight.dtype).eps)
    return float((found - expected).norm()) <= slack * float(expected.norm())


def _forward(
    experts: Any, n_bits: int | None, hidden: torch.Tensor, chosen: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """The experts' function with inputs rounded token by token, or exactly."""

    def rounded(inputs: torch.Tensor) -> torch.Tensor:
        return inputs if n_bits is None else fake_quantize(inputs, "rows", n_bits=n_bits)

    inputs = rounded(hidden)

    def gate_up(expert: int, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs[tokens], experts.gate_up_proj[expert])

    def down(expert: int, between: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rounded(between), experts.down_proj[expert])

    count = len(experts.down_proj)
    return run_experts(hidden, chosen, counts, gate_up, gate_of(experts), down, count)


@contextmanager
def fake_quantized_experts(model: nn.Module, *, n_bits: int = 8, weights: bool = True) -> Iterator[None]:
    """Let stacked experts compute with rounded inputs, and weights, while the block runs."""
    changed, kept = [], []
    try:
        for module in stacked_experts(model).values():
            for parameter in (getattr(module, name) for name in EXPERT_WEIGHTS) if weights else ():
                kept.append((parameter, parameter.data))
                rows = parameter.data.reshape(-1, parameter.shape[-1])
                parameter.data = fake_quantize(rows, "rows", n_bits=n_bits).reshape(parameter.shape)
            module.forward = partial(_forward, module, n_bits)
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward
        for parameter, value in kept:
            parameter.data = value
