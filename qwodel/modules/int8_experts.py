"""Experts of a mixture whose stacked weights are INT8.

transformers keeps the experts of a layer in two parameters, ``gate_up_proj`` ``[E, 2I, H]`` and
``down_proj`` ``[E, H, I]``. Here both are codes with a scale a row, and both inputs are rounded token
by token, as in :class:`~qwodel.modules.int8_linear.Int8Linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from qwodel.algorithms.quant_types import INT8, ROW
from qwodel.algorithms.scales import quantize_matrix
from qwodel.modules.int8_arithmetic import RoundedInputs, int_mm_works, multiply, rescale, round_rows

__all__ = ["Int8Experts", "Product", "gate_of", "run_experts"]

Product = Callable[[int, torch.Tensor], torch.Tensor]
"""``(expert, inputs [T, N]) → outputs [T, M]``."""


def gate_of(experts: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What lies between the projections: ``[tokens, 2I] → [tokens, I]``."""
    if hasattr(experts, "_apply_gate"):
        own: Callable[[torch.Tensor], torch.Tensor] = experts._apply_gate  # noqa: SLF001  (the architecture's own gate)
        return own

    def gated(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        found: torch.Tensor = experts.act_fn(gate) * up
        return found

    return gated


def run_experts(
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Callable[[int, torch.Tensor], torch.Tensor],
    activate: Callable[[torch.Tensor], torch.Tensor],
    down: Product,
    count: int,
) -> torch.Tensor:
    """Send tokens through their experts.

    Args:
        hidden: ``[T, H]``.
        chosen: numbers of each token's experts, ``[T, K]``; those from ``count`` on stand for none.
        weights: what their outputs count, ``[T, K]``.
        gate_up: ``(expert, indices of tokens) → [tokens, 2I]``.
        activate: ``[tokens, 2I] → [tokens, I]``.
        down: from there to ``[tokens, H]``.
        count: number of experts.
    """
    out = torch.zeros_like(hidden)
    for expert in torch.unique(chosen).tolist():
        if expert >= count:
            continue
        tokens, place = torch.where(chosen == expert)
        found = down(expert, activate(gate_up(expert, tokens)))
        out.index_add_(0, tokens, (found * weights[tokens, place, None]).to(out.dtype))
    return out


class Int8Experts(nn.Module):
    """Stands in for a transformers module of stacked experts, with its call ``(hidden, chosen, weights)``.

    Attributes:
        gate_up_proj, down_proj: int8 codes ``[E, 2I, H]`` and ``[E, H, I]``.
        gate_up_proj_scale, down_proj_scale: fp32 ``[E, 2I, 1]`` and ``[E, H, 1]``.
        experts: the module it stands in for, without weights; it knows its activation function.
        exact: multiply integers; ``False`` multiplies what the codes stand for.
    """

    gate_up_proj: torch.Tensor
    gate_up_proj_scale: torch.Tensor
    down_proj: torch.Tensor
    down_proj_scale: torch.Tensor

    def __init__(self, experts: Any, codes: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        for name, (values, scale) in codes.items():
            self.register_buffer(name, values)
            self.register_buffer(f"{name}_scale", scale)
            setattr(experts, name, None)
        self.count = len(self.down_proj)
        self.activate = gate_of(experts)
        self.exact: bool | None = None

    @classmethod
    def from_float(cls, experts: Any) -> Self:
        """Round the weights to the nearest codes; ``experts`` loses its weights.

        Raises:
            ValidationError: NaN or Inf among them.
        """
        codes = {}
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name).detach()
            found = quantize_matrix(weight.reshape(-1, weight.shape[-1]), INT8, ROW)
            codes[name] = found.codes.reshape(weight.shape), found.scale.reshape(*weight.shape[:2], 1)
        return cls(experts, codes)

    @torch.no_grad()
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``[T, H]`` with ``[T, K]`` experts a token → ``[T, H]``."""
        if self.exact is None:
            self.exact = int_mm_works(hidden_states.device.type, hidden_states.device.index)
        dtype = hidden_states.dtype
        rounded = round_rows(hidden_states)
        # The experts round too, into the same memory.
        codes, scale = rounded.codes.clone(), rounded.scale

        def gate_up(expert: int, tokens: torch.Tensor) -> torch.Tensor:
            return self._product("gate_up_proj", expert, RoundedInputs(codes[tokens], scale[tokens]), dtype)

        def down(expert: int, inputs: torch.Tensor) -> torch.Tensor:
            return self._product("down_proj", expert, round_rows(inputs), dtype)

        return run_experts(
            hidden_states, top_k_index, top_k_weights, gate_up, self.activate, down, self.count
        )

    def dequantize(self, name: str) -> torch.Tensor:
        """The weights that the codes of ``gate_up_proj`` or ``down_proj`` stand for, fp32."""
        codes: torch.Tensor = getattr(self, name)
        scale: torch.Tensor = getattr(self, f"{name}_scale")
        return codes.float() * scale

    def _product(self, name: str, expert: int, rounded: RoundedInputs, dtype: torch.dtype) -> torch.Tensor:
        weight, scale = getattr(self, name)[expert], getattr(self, f"{name}_scale")[expert]
        product = (
            multiply(rounded.codes, weight, keep=False)
            if self.exact
            else rounded.codes.float() @ weight.float().T
        )
        return rescale(product, rounded.scale, scale.T, None, dtype)

    def extra_repr(self) -> str:
        """Number of experts and shape of one's gate and up projections."""
        return f"{self.count} experts, {tuple(self.gate_up_proj.shape[1:])}"
