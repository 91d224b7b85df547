"""Weights cast to another floating-point dtype, or kept as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwodel.algorithms.fp8_decode import codes_to_float
from qwodel.checkpoint.formats.codec import Codec, RowDecoder, TensorSource

__all__ = ["CASTS", "PlainDecoder", "cast_to"]


@dataclass(frozen=True, slots=True)
class PlainDecoder(RowDecoder):
    """The stored numbers themselves: in their own dtype, or as fp32 where that is an 8-bit one."""

    data: str

    def rows(self, reader: TensorSource, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` in the stored dtype; 8-bit ones in fp32."""
        stored = reader.get_rows(self.data, start, stop)
        return stored if stored.dtype.itemsize > 1 else codes_to_float(stored)


def cast_to(dtype: str) -> Codec:
    """A cast to a safetensors dtype that is no format of its own, as kept weights that were decoded need."""
    return Codec(dtype.lower(), cast_to=dtype, nominal_bits=16.0)


CASTS = (
    Codec(
        "fp16",
        cast_to="F16",
        backend="int8",
        description="every weight cast to FP16, nothing quantized",
        read_by="ComfyUI, vLLM, transformers",
        nominal_bits=16.0,
    ),
    Codec("bf16", cast_to="BF16", nominal_bits=16.0),
)
