"""How GPTQ works: its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwodel.exceptions import ConfigurationError

__all__ = ["DEFAULT_DAMPING", "MAX_DAMPING", "GptqOptions"]

DEFAULT_DAMPING = 0.03
"""λ as a share of the mean diagonal."""

MAX_DAMPING = 1.0


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """How GPTQ works.

    Attributes:
        block_size: columns between two updates of all later columns; the codes do not depend on it.
        damping: λ as a share of the Gram matrix's mean diagonal; raised tenfold, up to 1, while the
            matrix cannot be factored.
        act_order: the columns with the largest inputs first.
        segments: parts in which the inverse factor is made; more of them need less memory, and less
            work, as U is triangular. The codes do not depend on it.
        segment_from: input channels from which it is made in parts.
        lazy: update later columns once a block; ``False`` updates them after every column.
        scale: ``"search"`` looks for the scales of least error in the norm of the Gram matrix's
            diagonal (the terms between columns are what GPTQ removes), ``"absmax"`` takes the
            smallest that clip nothing, ``"auto"`` is absmax for integers with a scale for each
            row, group or block, whose outliers are dear, and search for all others.
    """

    block_size: int = 32
    damping: float = DEFAULT_DAMPING
    act_order: bool = True
    lazy: bool = True
    segments: int = 4
    segment_from: int = 0
    scale: Literal["auto", "search", "absmax"] = "auto"

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigurationError(f"block_size counts columns, so it is not {self.block_size}")
        if self.segments < 1:
            raise ConfigurationError(f"segments are counted from 1, so there are not {self.segments}")
        if not 0 < self.damping <= MAX_DAMPING:
            raise ConfigurationError(f"damping is a share of the mean diagonal in (0, 1], not {self.damping}")
        if self.scale not in ("auto", "search", "absmax"):
            raise ConfigurationError(f"scale is 'auto', 'search' or 'absmax', not {self.scale!r}")
