"""INT8 codes as compressed-tensors packs them, the one integer form in which transformers takes experts.

From 0 on, four to a little-endian int32 (``pack-quantized`` of 8 bits): ``weight_packed``, ``weight_scale`` and
``weight_shape``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwodel.algorithms.quant_types import INT8, ROW
from qwodel.checkpoint.files.output_tensor import Role
from qwodel.checkpoint.formats.codec import (
    TRANSFORMERS,
    Activations,
    Dialect,
    Part,
    ReaderSupport,
    RowDecoder,
    TensorSource,
)
from qwodel.checkpoint.formats.scaled import Scaled, ScaledDecoder
from qwodel.checkpoint.formats.stated import Recognised, StoredTensors

__all__ = [
    "PACKED_INT8",
    "PackedInt8Decoder",
    "PackedInt8Rows",
    "pack_int8",
    "recognise_packed_int8",
    "unpack_int8",
]

_SIGN = 0x80
_PER_WORD = 4


def pack_int8(codes: torch.Tensor) -> torch.Tensor:
    """int8 ``[M, N]``, N a multiple of 4 → int32 ``[M, N/4]``."""
    return (codes.contiguous().view(torch.uint8) ^ _SIGN).view(torch.int32)


def unpack_int8(packed: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_int8`."""
    return (packed.contiguous().view(torch.uint8) ^ _SIGN).view(torch.int8)


@dataclass(frozen=True, slots=True)
class PackedInt8Decoder(ScaledDecoder):
    """INT8 codes four to an int32, times a dequant scale."""

    def codes(self, reader: TensorSource, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` of codes in fp32, unpacked from int32 words of four."""
        return unpack_int8(reader.get_rows(self.data, start, stop)).float()


@dataclass(frozen=True, slots=True)
class PackedInt8Rows(Scaled):
    """``int8_row`` with four codes a word; weights only, whatever the other layers' inputs are."""

    def obstacle(self, shape: tuple[int, ...], dialect: Dialect) -> str | None:
        """Why not: columns that are no multiple of 4."""
        del dialect
        if shape[1] % _PER_WORD:
            return f"{shape[1]} inputs are no multiple of {_PER_WORD}, as packing needs"
        return None

    def parts(self, shape: tuple[int, ...], dialect: Dialect) -> tuple[Part, ...]:
        """Words ``[M, N/4]`` of int32, fp32 scales ``[M, 1]``, and the shape as int64 ``[2]``."""
        del dialect
        rows, columns = shape
        return (
            Part("weight_packed", "I32", (rows, columns // _PER_WORD), Role.CODES),
            Part("weight_scale", "F32", (rows, 1), Role.SCALE),
            Part("weight_shape", "I64", (2,), Role.CONSTANT, struct.pack("<2q", rows, columns)),
        )

    def encode_codes(self, codes: torch.Tensor, dialect: Dialect) -> Mapping[str, torch.Tensor]:
        """Codes four to an int32, the first in the lowest byte."""
        del dialect
        return {"weight_packed": pack_int8(codes)}

    def decoder(self, names: Mapping[str, str], shape: tuple[int, ...], dialect: Dialect) -> RowDecoder:
        """The decoder of packed codes with one scale a row."""
        del dialect
        return PackedInt8Decoder(names["weight_packed"], names["weight_scale"], (1, shape[1]))

    def compressed_tensors(self, activations: Activations) -> ReaderSupport:
        """transformers loads it."""
        del activations
        return ReaderSupport(True, TRANSFORMERS)

    def scheme(self, activations: Activations) -> dict[str, Any]:
        """``pack-quantized``: INT8 rows, inputs as they are."""
        described = Scaled.scheme(self, activations)
        return {**described, "input_activations": None, "format": "pack-quantized"}

    @property
    def merges_experts(self) -> bool:
        """Always: it stands for what transformers merges."""
        return True


PACKED_INT8 = PackedInt8Rows("int8_row_packed", INT8, ROW)
"""No format that users name: the layout of model directories stores experts of ``int8_row`` so."""


def recognise_packed_int8(stored: StoredTensors, name: str) -> Recognised | None:
    """Packed words beside their scales and shape, where the configuration says that codes have 8 bits.

    Raises:
        ValidationError: they are packed integers of another kind.
    """
    if not name.endswith(".weight_packed") or stored.reader.entry(name).dtype == "U8":
        return None
    stem = name.removesuffix("_packed")
    parts = (f"{stem}_scale", f"{stem}_shape")
    reader = stored.reader
    if (
        reader.entry(name).dtype != "I32"
        or not stored.stated.packs_int8
        or not all(part in reader for part in parts)
    ):
        raise stored.refusal(f"packed integers (tensor {name!r})")
    rows, words = reader.get_shape(name)
    shape = (rows, _PER_WORD * words)
    if tuple(reader.get_tensor(f"{stem}_shape").tolist()) != shape:
        raise stored.refusal(f"packed INT8 of an unknown layout (tensor {name!r})")
    block = stored.block(stem, shape, reader.get_shape(f"{stem}_scale"))
    decoder = PackedInt8Decoder(name, f"{stem}_scale", block)
    return Recognised(stem, shape, (name, f"{stem}_scale"), decoder, "packed INT8")
