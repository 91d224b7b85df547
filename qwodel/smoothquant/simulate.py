"""Running a model as W8A8 arithmetic would: weights and inputs of its linear layers on integer grids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from qwodel.algorithms.hadamard import convrot_weight
from qwodel.modeling.observe.layers import is_linear
from qwodel.smoothquant.fake_quant import fake_quantize
from qwodel.smoothquant.scheme import Scheme
from qwodel.smoothquant.stacked_experts import fake_quantized_experts

__all__ = ["fake_quantized", "quantizable_layers"]

_TINY = 1e-12
_SMALLEST = 8  # outputs; gates of one or a few experts are kept as they are


def quantizable_layers(model: Any) -> dict[str, nn.Module]:
    """Linear layers and Conv1D that W8A8 quantizes, by name: all but the head and tiny gates."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

    def suits(module: nn.Module) -> bool:
        return is_linear(module) and module is not head and _outputs(module) >= _SMALLEST

    return {name: module for name, module in model.named_modules() if suits(module)}


def _outputs(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[1 if type(module).__name__ == "Conv1D" else 0]


@contextmanager
def fake_quantized(
    model: nn.Module,
    scheme: Scheme | None = None,
    *,
    n_bits: int = 8,
    input_scales: Mapping[str, float] | None = None,
    layers: Mapping[str, nn.Module] | None = None,
    weights: bool = True,
    token_steps: float | None = None,
    experts: bool = True,
) -> Iterator[None]:
    """Let a model compute with rounded weights and inputs while the block runs; weights come back after.

    Args:
        model: a transformers language model.
        scheme: what shares a scale; a channel of weights and a token where ``None``.
        n_bits: bits of weights and inputs.
        input_scales: static scales by layer, for activations with one scale a tensor.
        layers: the layers concerned; all quantizable ones where ``None``.
        weights: ``False`` rounds inputs only.
        token_steps: a token's scale is its greatest value over this; 2ⁿ⁻¹ − 1 where ``None``, and
            2ⁿ⁻¹ − ½ in compressed-tensors.
        experts: also stacked experts, with a scale a row and a token whatever the scheme.

    Raises:
        ConfigurationError: ``n_bits`` outside 2..16.
    """
    scheme = scheme or Scheme()
    hooks, kept = [], []
    try:
        for name, module in (quantizable_layers(model) if layers is None else layers).items():
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            transposed = type(module).__name__ == "Conv1D"
            matrix = weight.data.T if transposed else weight.data
            rotation = scheme.rotation(matrix.shape[1])
            if weights:
                turned = convrot_weight(matrix, rotation).to(matrix.dtype) if rotation else matrix
                rounded = fake_quantize(
                    turned, "rows" if scheme.weights == "channel" else "tensor", n_bits=n_bits
                )
                kept.append((weight, weight.data))
                weight.data = rounded.T.contiguous() if transposed else rounded
            scale = None if input_scales is None else input_scales.get(name)
            hook = partial(_round_input, scheme, rotation, n_bits, scale, token_steps)
            hooks.append(module.register_forward_pre_hook(hook))
        with fake_quantized_experts(model, n_bits=n_bits, weights=weights) if experts else nullcontext():
            yield
    finally:
        for each in hooks:
            each.remove()
        for parameter, value in kept:
            parameter.data = value


def _round_input(
    scheme: Scheme,
    rotation: int | None,
    n_bits: int,
    scale: float | None,
    token_steps: float | None,
    _: nn.Module,
    args: tuple[Any, ...],
) -> tuple[Any, ...]:
    x = args[0]
    if rotation:
        x = convrot_weight(x.reshape(-1, x.shape[-1]), rotation).reshape(x.shape).to(x.dtype)
    if scheme.activations == "token":
        scales = None if token_steps is None else (x.abs().amax(-1).float() / token_steps).clamp_(min=_TINY)
        rounded = fake_quantize(x, "rows", scales, n_bits=n_bits)
    else:
        rounded = fake_quantize(
            x, "tensor", None if scale is None else torch.tensor(scale, dtype=torch.float32), n_bits=n_bits
        )
    return (rounded, *args[1:])
