"""INT8 rows of columns that are rotated in groups (ConvRot), as ComfyUI reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwodel.algorithms.hadamard import Basis, ConvRot, convrot_group_size, convrot_weight
from qwodel.algorithms.quant_types import INT8, ROW
from qwodel.checkpoint.formats.codec import (
    Activations,
    Codec,
    Dialect,
    ReaderSupport,
    RowDecoder,
    TensorSource,
)
from qwodel.checkpoint.formats.scaled import INT8_ROW, Scaled, ScaledDecoder, scaled_codes
from qwodel.checkpoint.formats.stated import Recognised, StoredTensors
from qwodel.exceptions import ConfigurationError

__all__ = ["CONVROT", "ConvRotRows", "RotatedDecoder", "needs_rotated_inputs", "recognise_convrot"]

_DEFAULT_GROUP = 256
_GROUPS = (4, 16, 64, 256, 1024)


@dataclass(frozen=True, slots=True)
class RotatedDecoder(RowDecoder):
    """ConvRot weights: scaled codes whose columns are rotated in groups.

    Attributes:
        rotated: decodes the rotated weight.
        size: columns of a group.
    """

    rotated: ScaledDecoder
    size: int

    @property
    def scaled(self) -> ScaledDecoder:
        """The codes and scales of the rotated weight."""
        return self.rotated

    def basis(self, reader: TensorSource) -> Basis:
        """The rotation in groups of columns."""
        del reader
        return ConvRot(self.size)

    def rows(self, reader: TensorSource, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)``, rotated back: rows do not mix."""
        rows = self.rotated.rows(reader, start, stop)
        return convrot_weight(rows, self.size).to(rows.dtype)


@dataclass(frozen=True, slots=True)
class ConvRotRows(Scaled):
    """``int8_row`` of a rotated weight; the largest group that divides the columns."""

    @property
    def rotates(self) -> bool:
        """Always: readers must rotate inputs."""
        return True

    def basis(self, shape: tuple[int, ...]) -> Basis | None:
        """The rotation in the largest groups that divide the columns of ``[M, N]``; ``None`` where none does."""
        size = convrot_group_size(shape[1])
        return None if size is None else ConvRot(size)

    def fitting(self, columns: int) -> Codec:
        """This format, or ``int8_row`` where no group divides the columns."""
        return self if convrot_group_size(columns) else INT8_ROW

    def decoder(self, names: Mapping[str, str], shape: tuple[int, ...], dialect: Dialect) -> RowDecoder:
        """The scaled rows' decoder, with the rotation undone where there is one."""
        plain = Scaled.decoder(self, names, shape, dialect)
        size = convrot_group_size(shape[1])
        assert isinstance(plain, ScaledDecoder)
        return plain if size is None else RotatedDecoder(plain, size)

    def comfyui_description(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """``int8_row``'s description, with ``convrot`` and ``convrot_groupsize``."""
        description = Scaled.comfyui_description(self, shape)
        if size := convrot_group_size(shape[1]):
            description |= {"convrot": True, "convrot_groupsize": size}
        return description

    def compressed_tensors(self, activations: Activations) -> ReaderSupport:
        """Raise ConfigurationError: no reader of that layout rotates inputs."""
        del activations
        raise needs_rotated_inputs(self)


def needs_rotated_inputs(codec: Codec) -> ConfigurationError:
    """The error of a format whose inputs compressed-tensors' readers would not rotate."""
    return ConfigurationError(
        f"compressed-tensors readers do not rotate activations as {codec.name} weights need",
        hint="use layout='comfyui', or the format int8_row",
    )


CONVROT = ConvRotRows(
    "int8_convrot",
    INT8,
    ROW,
    backend="int8",
    description="INT8 rows of rotated columns: the most accurate INT8 for ComfyUI, whose activations are INT8 too",
    read_by="ComfyUI",
    aliases=("convrot",),
)


def recognise_convrot(stored: StoredTensors, name: str) -> Recognised | None:
    """INT8 rows whose description says that they are rotated."""
    description = stored.description(name)
    if not description.get("convrot") or stored.reader.entry(name).dtype != "I8":
        return None
    plain = scaled_codes(stored, name)
    if plain is None:
        return None
    size = description.get("convrot_groupsize", _DEFAULT_GROUP)
    if not isinstance(size, int) or size not in _GROUPS or plain.shape[1] % size:
        raise stored.refusal(f"INT8 rotated in groups of {size} (tensor {name!r})")
    assert isinstance(plain.decoder, ScaledDecoder)
    return Recognised(name, plain.shape, plain.stored, RotatedDecoder(plain.decoder, size), "INT8 ConvRot")
