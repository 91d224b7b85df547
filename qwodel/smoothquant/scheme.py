"""How a W8A8 model is quantized: what shares a scale, and which rotations go before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwodel.exceptions import ConfigurationError

__all__ = ["ActivationScales", "Scheme", "WeightScales"]

WeightScales = Literal["channel", "tensor"]
ActivationScales = Literal["token", "tensor"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """What weights and activations are rounded with.

    Attributes:
        weights: one scale an output ``channel``, or one a ``tensor``.
        activations: one scale a ``token``, or one a ``tensor``.
        rotate_inputs: layers rotate their inputs in Hadamard groups of up to this size before they
            round them; 0 does not. Only :class:`~qwodel.modules.int8_linear.Int8Linear` computes so.
    """

    weights: WeightScales = "channel"
    activations: ActivationScales = "token"
    rotate_inputs: int = 0

    def __post_init__(self) -> None:
        if self.weights not in ("channel", "tensor"):
            raise ConfigurationError(
                f"weights have scales of a 'channel' or a 'tensor', not {self.weights!r}"
            )
        if self.activations not in ("token", "tensor"):
            raise ConfigurationError(
                f"activations have scales of a 'token' or a 'tensor', not {self.activations!r}"
            )
        if self.rotate_inputs and self.rotate_inputs < 4:
            raise ConfigurationError(f"rotate_inputs is 0 or at least 4, not {self.rotate_inputs}")

    def rotation(self, columns: int) -> int | None:
        """The size of the groups in which ``columns`` inputs are rotated; ``None`` where they are not."""
        from qwodel.algorithms.hadamard import convrot_group_size

        return convrot_group_size(columns, self.rotate_inputs) if self.rotate_inputs else None
