"""What a way of storing a weight says about itself, in one place.

A :class:`Codec` is a frozen value without state. It works on *local* names, those of a layer's own
tensors (``weight``, ``weight_scale`` …), and on two dialects: ComfyUI's, where each layer carries a
description, and compressed-tensors', where ``config.json`` describes all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self

import torch

from qwodel.algorithms.hadamard import Basis
from qwodel.algorithms.quant_types import TENSOR, Granularity, QuantType
from qwodel.algorithms.scales import Quantized
from qwodel.checkpoint.files.output_tensor import Role
from qwodel.exceptions import ConfigurationError

__all__ = ["Activations", "Codec", "Dialect", "Part", "ReaderSupport", "RowDecoder", "TensorSource"]

Dialect = Literal["comfyui", "compressed-tensors"]
Activations = Literal["dynamic", "static", "none"]

COMFYUI = "ComfyUI"
TRANSFORMERS = "transformers with compressed-tensors, vLLM"


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor that a weight becomes: its local name, and its bytes where they are known beforehand."""

    local: str
    dtype: str
    shape: tuple[int, ...]
    role: Role
    payload: bytes | None = None


@dataclass(frozen=True, slots=True)
class ReaderSupport:
    """Whether a reader loads a format as a rule, and if not, why not and what does."""

    loads: bool
    reader: str
    reason: str = ""


class TensorSource(Protocol):
    """Where a decoder reads: a checkpoint, or a mapping of tensors in tests."""

    def get_tensor(self, key: str, /) -> torch.Tensor:
        """The whole tensor."""

    def get_rows(self, key: str, start: int, stop: int, /) -> torch.Tensor:
        """Rows ``[start, stop)`` along the first dimension."""

    def get_shape(self, key: str, /) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""


class RowDecoder:
    """Reads rows of one weight as numbers, whatever codes they are stored in.

    A decoder is a frozen value that names the stored tensors it needs; it opens nothing itself, so it
    travels to worker processes.
    """

    __slots__ = ()

    def rows(self, reader: TensorSource, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` along the first dimension, as floating-point numbers."""
        raise NotImplementedError

    @property
    def scaled(self) -> ScaledRows | None:
        """The codes and scales below it, to be measured where they are; ``None`` where there are none to tell apart."""
        return None

    def basis(self, reader: TensorSource) -> Basis | None:
        """The basis of those codes; ``None`` for the weight's own."""
        del reader
        return None

    @property
    def whole(self) -> bool:
        """Whether any row takes all of them."""
        return False


class ScaledRows(Protocol):
    """Codes times a dequant scale."""

    @property
    def block(self) -> tuple[int, ...]:
        """Codes a scale covers along each dimension."""

    def codes(self, reader: TensorSource, start: int, stop: int) -> torch.Tensor:
        """The codes of rows ``[start, stop)`` in fp32."""

    def factors(self, reader: TensorSource) -> torch.Tensor:
        """All scales, in fp32."""

    def spread(self, scale: torch.Tensor, start: int, stop: int, shape: torch.Size) -> torch.Tensor:
        """Those of :meth:`factors` that rows ``[start, stop)`` have, broadcastable to those rows' ``shape``."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How one weight ``[M, N]`` is stored.

    Attributes:
        name: what users write, such as ``fp8_e4m3_row``.
        quant_type: what a code is; ``None`` where weights are cast.
        granularity: which codes share a scale.
        cast_to: the safetensors dtype of a cast.
        backend: the backend that lists it; none where it is part of others only.
        description, read_by, aliases: its line in ``list-formats``.
        nominal_bits: bits a weight, small scales not counted.
    """

    name: str
    quant_type: QuantType | None = None
    granularity: Granularity = TENSOR
    cast_to: str | None = None
    backend: str | None = None
    description: str = ""
    read_by: str = ""
    aliases: tuple[str, ...] = ()
    nominal_bits: float = 8.0

    @property
    def quantizes(self) -> bool:
        """Whether weights become codes with scales."""
        return self.quant_type is not None

    @property
    def mixes_rows(self) -> bool:
        """Whether a code depends on more than its own row, so that weights are worked on whole."""
        return False

    @property
    def rotates(self) -> bool:
        """Whether codes belong to a rotated weight, which a reader has to know of."""
        return False

    def basis(self, shape: tuple[int, ...]) -> Basis | None:
        """The basis that codes of a weight of this shape belong to; ``None`` for the weight's own."""
        del shape
        return None

    def fitting(self, columns: int) -> Codec:
        """This format, or its nearest one that a weight of so many columns can have."""
        del columns
        return self

    def with_block_size(self, size: int) -> Self:
        """The same format with square blocks of ``size`` instead of its own.

        Raises:
            ConfigurationError: the format has no blocks, or only its own.
        """
        granularity = self.granularity
        if not granularity.is_block or granularity.block_rows != granularity.block_cols:
            raise ConfigurationError(
                f"format {self.name!r} has no blocks to choose, so block_size={size} means nothing",
                hint="choose a block format such as int8_block or fp8_e4m3_block",
            )
        return replace(self, granularity=Granularity.block(size))

    def obstacle(self, shape: tuple[int, ...], dialect: Dialect) -> str | None:
        """Why a weight of this shape cannot be stored so; ``None`` where it can."""
        del shape, dialect
        return None

    def parts(self, shape: tuple[int, ...], dialect: Dialect) -> tuple[Part, ...]:
        """The tensors a weight of this shape becomes: codes first, then scales, then constants."""
        raise NotImplementedError

    def encode_codes(self, codes: torch.Tensor, dialect: Dialect) -> Mapping[str, torch.Tensor]:
        """Codes of some whole rows as the bytes of their parts, by local name; rows follow one another there."""
        raise NotImplementedError

    def encode_scales(self, scale: torch.Tensor, dialect: Dialect) -> Mapping[str, torch.Tensor]:
        """All dequant scales of a weight as the bytes of their parts, by local name."""
        raise NotImplementedError

    def encode(self, quantized: Quantized, dialect: Dialect) -> dict[str, torch.Tensor]:
        """A whole weight: every part that :meth:`parts` gives no payload for, by local name."""
        return {
            **self.encode_codes(quantized.codes, dialect),
            **self.encode_scales(quantized.scale, dialect),
        }

    def decoder(self, names: Mapping[str, str], shape: tuple[int, ...], dialect: Dialect) -> RowDecoder:
        """What reads it back.

        Args:
            names: local name → the stored tensor's name.
            shape: the weight's.
        """
        raise NotImplementedError

    def bound(self, codes: torch.Tensor, scale: torch.Tensor, slack: float = 0.0) -> torch.Tensor:
        """The largest error of round-to-nearest: half the distance between neighbouring codes.

        Args:
            codes: fp32 codes of a slab; overwritten.
            scale: their scales, broadcastable to them.
            slack: what else may have been added to a weight, in units of its scale.

        Returns:
            Broadcastable to the codes; of the scale's shape where it is the same for all codes.
        """
        raise NotImplementedError

    def comfyui(self) -> ReaderSupport:
        """Whether ComfyUI as distributed loads it.

        Raises:
            ConfigurationError: ComfyUI's descriptions have no words for it.
        """
        return ReaderSupport(True, COMFYUI)

    def comfyui_description(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """What a layer's description says of it: ``format``, and what else decoding takes.

        Raises:
            ConfigurationError: as :meth:`comfyui`.
        """
        del shape
        return {}

    @property
    def legacy_fp8(self) -> str | None:
        """Why files from before ComfyUI's descriptions (``scaled_fp8``) cannot hold it; ``None`` where they can."""
        return "legacy scaled files are read as FP8 E4M3 only"

    def compressed_tensors(self, activations: Activations) -> ReaderSupport:
        """Whether vLLM and transformers load it with inputs rounded so.

        Raises:
            ConfigurationError: compressed-tensors has no words for it.
        """
        del activations
        return ReaderSupport(True, TRANSFORMERS)

    def scheme(self, activations: Activations) -> dict[str, Any]:
        """``weights``, ``input_activations`` and ``format`` of its group in compressed-tensors' schema."""
        raise NotImplementedError

    @property
    def merges_experts(self) -> bool:
        """Whether transformers takes experts stored so, which it merges as it loads."""
        return False

    def __str__(self) -> str:
        return self.name
