"""Looking for NaN and Inf in weights before a plan is made."""

from __future__ import annotations

from collections.abc import Iterable

from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.files.slabs import row_slabs
from qwodel.checkpoint.source.source_tensor import SourceTensor

__all__ = ["nonfinite_weights"]


def nonfinite_weights(reader: UnifiedSafetensorsLoader, sources: Iterable[SourceTensor]) -> frozenset[str]:
    """Return the names of weights that hold NaN or Inf; reads each of them once, in slabs of rows."""
    return frozenset(source.name for source in sources if not _finite(reader, source))


def _finite(reader: UnifiedSafetensorsLoader, source: SourceTensor) -> bool:
    return all(
        bool(source.row_decoder.rows(reader, start, stop).isfinite().all())
        for start, stop in row_slabs(source.shape)
    )
