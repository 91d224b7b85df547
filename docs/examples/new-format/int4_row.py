"""INT4 codes with one scale a row, two codes a byte: an example of a new format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwodel.algorithms.quant_types import INT4, ROW
from qwodel.checkpoint.files.output_tensor import Role
from qwodel.checkpoint.formats.codec import (
    COMFYUI,
    Activations,
    Dialect,
    Part,
    ReaderSupport,
    RowDecoder,
    TensorSource,
)
from qwodel.checkpoint.formats.scaled import Scaled, ScaledDecoder
from qwodel.checkpoint.formats.stated import Recognised, StoredTensors
from qwodel.exceptions import ConfigurationError

_LABEL = "int4_row"


@dataclass(frozen=True, slots=True)
class PairsDecoder(ScaledDecoder):
    """Two codes a byte, the even column in the low nibble, both offset by 8."""

    def codes(self, reader: TensorSource, start: int, stop: int) -> torch.Tensor:
        pairs = reader.get_rows(self.data, start, stop)
        return torch.stack([pairs & 0xF, pairs >> 4], dim=-1).flatten(-2).float() - 8


@dataclass(frozen=True, slots=True)
class Int4Rows(Scaled):
    """Scales and the bound of rounding are those of all scaled formats; codes are packed."""

    def obstacle(self, shape: tuple[int, ...], dialect: Dialect) -> str | None:
        return f"{shape[1]} columns are not even" if shape[1] % 2 else None

    def parts(self, shape: tuple[int, ...], dialect: Dialect) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part("weight", "U8", (rows, columns // 2), Role.CODES),
            Part("weight_scale", "F32", (rows, 1), Role.SCALE),
        )

    def encode_codes(self, codes: torch.Tensor, dialect: Dialect) -> Mapping[str, torch.Tensor]:
        offset = (codes + 8).to(torch.uint8)
        return {"weight": offset[:, 0::2] | offset[:, 1::2] << 4}

    def decoder(self, names: Mapping[str, str], shape: tuple[int, ...], dialect: Dialect) -> RowDecoder:
        return PairsDecoder(names["weight"], names["weight_scale"], (1, shape[1]))

    def comfyui(self) -> ReaderSupport:
        return ReaderSupport(False, COMFYUI, "it is an example")

    def comfyui_description(self, shape: tuple[int, ...]) -> dict[str, Any]:
        return {"format": _LABEL}

    def compressed_tensors(self, activations: Activations) -> ReaderSupport:
        raise ConfigurationError(f"{self.name} is an example for the comfyui layout")


INT4_ROW = Int4Rows(
    "int4_row",
    INT4,
    ROW,
    backend="int8",
    description="INT4, one scale a row",
    read_by="qwodel",
    nominal_bits=4.0,
)


def recognise_int4_row(stored: StoredTensors, name: str) -> Recognised | None:
    """Bytes whose description names the format."""
    if stored.description(name).get("format") != _LABEL:
        return None
    rows, half = stored.reader.get_shape(name)
    decoder = PairsDecoder(name, f"{name}_scale", (1, 2 * half))
    return Recognised(name, (rows, 2 * half), (name, f"{name}_scale"), decoder, "INT4 row")
