"""Cutting a tensor into slabs of whole rows that are read, worked on and written one after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

__all__ = ["CACHED_ELEMENTS", "SLAB_ELEMENTS", "row_slabs"]

SLAB_ELEMENTS = 1 << 21
"""Elements of a slab on its way to a device: 8 MiB as fp32. Results do not depend on the size of slabs."""

CACHED_ELEMENTS = 1 << 18
"""Elements of a slab that one core reads, works on and writes: small enough to stay in its caches and to be read
into memory that the slab before has left, since fresh memory costs more than reading does."""


def row_slabs(
    shape: Sequence[int], multiple: int = 1, elements: int = SLAB_ELEMENTS
) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)`` along the first dimension, each but the last a multiple of ``multiple`` rows."""
    if not shape:
        yield 0, 1
        return
    per_row = max(math.prod(shape[1:]), 1)
    step = max(elements // per_row // multiple, 1) * multiple
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
