"""Where linear layers are cut: segments of their outputs and inputs, by name and for one weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch

from qwodel.modeling.patterns import Patterns

__all__ = ["Seams", "WeightCut"]


@dataclass(frozen=True, slots=True)
class WeightCut:
    """Where a weight is cut into blocks with scales of their own.

    Attributes:
        outputs: rows of each segment.
        inputs: columns of each segment.
    """

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Seams:
    """Where the linear layers of a model are cut.

    Attributes:
        outputs, inputs: layer → sizes of the segments.
        activated: layers that an activation function feeds.
    """

    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    activated: frozenset[str] = frozenset()

    @classmethod
    def of(cls, patterns: Patterns | None) -> Self:
        """Those that were found; none where ``None``."""
        if patterns is None:
            return cls()
        return cls(patterns.output_segments(), patterns.input_segments(), frozenset(patterns.activations()))

    def cut(self, name: str, weight: torch.Tensor) -> WeightCut:
        """The segments of a weight ``[M, N]``; all of it where nothing was found."""
        rows, columns = weight.shape
        return WeightCut(self.outputs.get(name) or (rows,), self.inputs.get(name) or (columns,))
