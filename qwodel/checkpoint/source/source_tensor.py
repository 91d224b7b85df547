"""The weights of a source: which stored tensors each is made of, and what reads it as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwodel.checkpoint.files.dtypes import FLOAT_DTYPES
from qwodel.checkpoint.formats.cast import PlainDecoder
from qwodel.checkpoint.formats.codec import RowDecoder

__all__ = ["SourceTensor", "Sources"]


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One weight of the source, as numbers.

    Attributes:
        name: the name it has when it is not quantized.
        shape: the shape of the numbers.
        dtype: safetensors dtype to store the numbers in when they are kept.
        stored: the source's tensors it is read from; the data first.
        decoder: ``None`` when the stored bytes are the tensor.
        encoding: what the codes were, for the plan: ``"FP8 block"`` …
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: tuple[str, ...]
    decoder: RowDecoder | None = None
    encoding: str = ""

    @property
    def is_float(self) -> bool:
        """Whether this is a weight that can be quantized or cast."""
        return self.decoder is not None or self.dtype in FLOAT_DTYPES

    @property
    def row_decoder(self) -> RowDecoder:
        """What reads rows of it as numbers."""
        return self.decoder or PlainDecoder(self.stored[0])


@dataclass(frozen=True, slots=True)
class Sources:
    """All weights of a checkpoint, and the stored tensors that are folded into none of them."""

    tensors: tuple[SourceTensor, ...]
    dropped: Mapping[str, str]
