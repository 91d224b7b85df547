"""Every format: those that are written, by name, and what recognises those that are read.

A new format is a module beside this one, and its two entries here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from qwodel.checkpoint.formats.cast import CASTS
from qwodel.checkpoint.formats.codec import Codec
from qwodel.checkpoint.formats.convrot import CONVROT, recognise_convrot
from qwodel.checkpoint.formats.fp4 import recognise_mxfp4, recognise_nvfp4
from qwodel.checkpoint.formats.mxfp8 import MXFP8, recognise_mxfp8
from qwodel.checkpoint.formats.packed import recognise_packed_int8
from qwodel.checkpoint.formats.quip import QUIP, recognise_quip
from qwodel.checkpoint.formats.scaled import (
    FP8_BLOCK,
    FP8_E5M2_TENSOR,
    FP8_ROW,
    FP8_TENSOR,
    INT8_BLOCK,
    INT8_ROW,
    INT8_TENSOR,
    recognise_scaled,
)
from qwodel.checkpoint.formats.stated import Recognised, StoredTensors
from qwodel.exceptions import ConfigurationError, did_you_mean

__all__ = ["CODECS", "RECOGNISERS", "storage_format"]

_WRITTEN = (
    FP8_TENSOR, FP8_ROW, FP8_BLOCK, FP8_E5M2_TENSOR, MXFP8,
    INT8_ROW, CONVROT, QUIP, INT8_TENSOR, INT8_BLOCK,
    *CASTS,
)  # fmt: skip

_BY_NAME = {codec.name: codec for codec in _WRITTEN}
CODECS: Mapping[str, Codec] = MappingProxyType(_BY_NAME)
"""Every format that is written, by name, in the order a user should read them; block formats with 128×128 blocks."""

RECOGNISERS: tuple[Callable[[StoredTensors, str], Recognised | None], ...] = (
    recognise_mxfp4,
    recognise_nvfp4,
    recognise_packed_int8,
    recognise_mxfp8,
    recognise_quip,
    recognise_convrot,
    recognise_scaled,
)
"""The first that knows a stored tensor as its codes has it; what says more of itself comes first."""


def storage_format(name: str, block_size: int | None = None) -> Codec:
    """Return the format called ``name``, with ``block_size`` in place of 128 if given.

    Raises:
        ConfigurationError: no such format, or it has no blocks.
    """
    found = CODECS.get(name.casefold().replace("-", "_"))
    if found is None:
        raise ConfigurationError(
            f"no storage format is named {name!r}",
            hint=did_you_mean(name, CODECS) or f"known: {', '.join(CODECS)}",
        )
    return found if block_size is None else found.with_block_size(block_size)
