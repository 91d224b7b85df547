"""How one weight is stored: quantized with scales, or cast to another float dtype.

Names here (``fp8_e4m3_row``, ``int8_block``, ``fp16`` …) are the ones users
write; a :class:`StorageFormat` is what the planner and the layouts work with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from qwodel.algorithms.hadamard import Basis, ConvRot, convrot_group_size
from qwodel.algorithms.quant_types import FP8_E4M3, FP8_E5M2, INT8, ROW, TENSOR, Granularity, QuantType
from qwodel.algorithms.quip import QuipTransform
from qwodel.exceptions import ConfigurationError, did_you_mean

__all__ = ["STORAGE_FORMATS", "StorageFormat", "storage_format"]


@dataclass(frozen=True, slots=True)
class StorageFormat:
    """Either ``quant_type`` and ``granularity``, or ``cast_to`` (a safetensors dtype name).

    Attributes:
        convrot: columns are rotated in ConvRot groups before they are quantized.
        quip_seed: rows and columns are rotated by the random Hadamard transforms of this seed.
    """

    name: str
    quant_type: QuantType | None = None
    granularity: Granularity = TENSOR
    cast_to: str | None = None
    convrot: bool = False
    quip_seed: int | None = None

    @property
    def quantizes(self) -> bool:
        """Whether weights become codes with scales."""
        return self.quant_type is not None

    @property
    def bits(self) -> int:
        """Bits per stored weight, scales not counted."""
        return self.quant_type.bits if self.quant_type else 16

    def convrot_size(self, columns: int) -> int | None:
        """The rotation's group size for a weight of so many columns; ``None`` where nothing is rotated."""
        return convrot_group_size(columns) if self.convrot else None

    def basis(self, shape: tuple[int, ...]) -> Basis | None:
        """The basis that codes of a weight of this shape belong to; ``None`` for the weight's own."""
        if self.quip_seed is not None:
            return QuipTransform.seeded((shape[0], shape[1]), self.quip_seed)
        size = self.convrot_size(shape[1]) if self.convrot else None
        return None if size is None else ConvRot(size)

    @property
    def mixes_rows(self) -> bool:
        """Whether a code depends on more than its own row, so that weights are worked on whole."""
        return self.quip_seed is not None

    def fitting(self, columns: int) -> StorageFormat:
        """This format, or its form without rotation where no group size divides the columns."""
        if self.convrot and convrot_group_size(columns) is None:
            return storage_format("int8_row")
        return self

    def with_block_size(self, size: int) -> StorageFormat:
        """The same format with square blocks of ``size`` instead of its own.

        Raises:
            ConfigurationError: the format has no blocks.
        """
        if not self.granularity.is_block:
            raise ConfigurationError(
                f"format {self.name!r} has no blocks, so block_size={size} means nothing",
                hint="choose a block format such as int8_block or fp8_e4m3_block",
            )
        return replace(self, granularity=Granularity.block(size))

    def __str__(self) -> str:
        return self.name


def _table(*formats: StorageFormat) -> Mapping[str, StorageFormat]:
    return MappingProxyType({each.name: each for each in formats})


STORAGE_FORMATS = _table(
    StorageFormat("fp8_e4m3", FP8_E4M3, TENSOR),
    StorageFormat("fp8_e4m3_row", FP8_E4M3, ROW),
    StorageFormat("fp8_e4m3_block", FP8_E4M3, Granularity.block(128)),
    StorageFormat("fp8_e5m2", FP8_E5M2, TENSOR),
    StorageFormat("int8_tensor", INT8, TENSOR),
    StorageFormat("int8_row", INT8, ROW),
    StorageFormat("int8_convrot", INT8, ROW, convrot=True),
    StorageFormat("int8_quip", INT8, ROW, quip_seed=0),
    StorageFormat("int8_block", INT8, Granularity.block(128)),
    StorageFormat("fp16", cast_to="F16"),
    StorageFormat("bf16", cast_to="BF16"),
)
"""Every format by name; block formats with their usual 128×128 blocks."""


def storage_format(name: str, block_size: int | None = None) -> StorageFormat:
    """Return the format called ``name``, with ``block_size`` in place of 128 if given.

    Raises:
        ConfigurationError: no such format, or it has no blocks.
    """
    found = STORAGE_FORMATS.get(name.casefold().replace("-", "_"))
    if found is None:
        raise ConfigurationError(
            f"no storage format is named {name!r}",
            hint=did_you_mean(name, STORAGE_FORMATS) or f"known: {', '.join(STORAGE_FORMATS)}",
        )
    return found if block_size is None else found.with_block_size(block_size)
