"""What became of a model: its layers, those that were left alone, smoothing that was folded."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwodel.modeling.patterns import Patterns
from qwodel.report import decibels

__all__ = ["LayerReport", "QuantizationReport"]


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer.

    Attributes:
        error: ‖ŷ − y‖² / ‖y‖² on held-out rows.
        how: what was chosen.
    """

    name: str
    error: float
    how: str

    @property
    def sqnr(self) -> float:
        """The same in dB; at most 300."""
        return decibels(1.0, max(self.error, 1e-30))


@dataclass
class QuantizationReport:
    """What became of a model.

    Attributes:
        layers: in the order they were quantized.
        kept: names of layers that stay as they were → why.
        folded: layers whose smoothing went into the layer before.
    """

    patterns: Patterns | None = None
    layers: list[LayerReport] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)

    def table(self) -> str:
        """A line a layer."""
        width = max((len(each.name) for each in self.layers), default=5)
        lines = [f"{each.name:{width}}  {each.sqnr:6.2f} dB  {each.how}" for each in self.layers]
        return "\n".join([*lines, *(f"{name:{width}}  kept: {why}" for name, why in self.kept.items())])
