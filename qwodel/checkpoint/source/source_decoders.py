"""Reading rows of one weight as numbers, whatever codes the checkpoint holds them in.

Each decoder is a frozen value that names the stored tensors it needs; it opens
nothing itself, so it travels to worker processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from qwodel.algorithms.fp8_decode import codes_to_float
from qwodel.algorithms.hadamard import Basis, ConvRot, Rotation, convrot_weight
from qwodel.algorithms.quip import QuipTransform
from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.formats.packed_fp4 import decode_mxfp4, decode_nvfp4, unswizzle_scales
from qwodel.checkpoint.formats.packed_int8 import unpack_int8

__all__ = ["Mxfp4Decoder", "NvFp4Decoder", "PackedInt8Decoder", "PlainDecoder", "RowDecoder", "ScaledDecoder"]


class RowDecoder(Protocol):
    """Rows ``[start, stop)`` along the first dimension of one weight, as floating-point numbers."""

    def rows(self, reader: UnifiedSafetensorsLoader, start: int, stop: int) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class PlainDecoder:
    """The stored numbers themselves: in their own dtype, or as fp32 where that is an 8-bit one."""

    data: str

    def rows(self, reader: UnifiedSafetensorsLoader, start: int, stop: int) -> torch.Tensor:
        stored = reader.get_rows(self.data, start, stop)
        return stored if stored.dtype.itemsize > 1 else codes_to_float(stored)


@dataclass(frozen=True, slots=True)
class ScaledDecoder:
    """Codes times a dequant scale: fp32 rows.

    Attributes:
        data: FP8 or INT8 codes of any shape.
        scale: dequant factors, one for every ``block`` of codes.
        block: codes a scale covers along each dimension.
    """

    data: str
    scale: str
    block: tuple[int, ...]

    def rows(self, reader: UnifiedSafetensorsLoader, start: int, stop: int) -> torch.Tensor:
        codes = self.codes(reader, start, stop)
        return codes.mul_(self.spread(self.factors(reader), start, stop, codes.shape))

    def codes(self, reader: UnifiedSafetensorsLoader, start: int, stop: int) -> torch.Tensor:
        """The codes of rows ``[start, stop)`` in fp32."""
        return codes_to_float(reader.get_rows(self.data, start, stop))

    def factors(self, reader: UnifiedSafetensorsLoader) -> torch.Tensor:
        """All scales as stored, in fp32."""
        return reader.get_tensor(self.scale).float()

    def spread(self, scale: torch.Tensor, start: int, stop: int, shape: torch.Size) -> torch.Tensor:
        """Return those of :meth:`factors` that rows ``[start, stop)`` have, broadcastable to those rows' ``shape``."""
        if scale.numel() == 1:
            return scale.reshape(())
        scale = scale.reshape(*scale.shape, *(1 for _ in range(len(shape) - scale.ndim)))
        first = self.block[0]
        skip = 0
        if scale.shape[0] > 1:
            scale = scale[start // first : -(-stop // first)]
            skip = start % first
        for dim, size in enumerate(self.block):
            if size > 1 and (scale.shape[dim] > 1 or dim == 0):
                scale = scale.repeat_interleave(size, dim)
        window = [slice(None, n) for n in shape]
        window[0] = slice(skip, skip + shape[0])
        return scale[tuple(window)]


@dataclass(frozen=True, slots=True)
class PackedInt8Decoder(ScaledDecoder):
    """INT8 codes four to an int32, times a dequant scale."""

    def codes(self, reader: UnifiedSafetensorsLoader, start: int, stop: int) -> torch.Tensor:
        return unpack_int8(reader.get_rows(self.data, start, stop)).float()


@dataclass(frozen=True, slots=True)
class RotatedDecoder:
    """ConvRot weights: scaled codes whose columns are rotated in groups.

    Attributes:
        rotated: decodes the rotated weight.
        size: columns of a group.
    """

    rotated: ScaledDecoder
    size: int

    def basis(self, reader: UnifiedSafetensorsLoader) -> Basis:
        """The basis of the codes."""
        del reader
        return ConvRot(self.size)

    def rows(self, reader: UnifiedSafetensorsLoader, start: int, stop: int) -> torch.Tensor:
        rows = self.rotated.rows(reader, start, stop)
        return convrot_weight(rows, self.size).to(rows.dtype)


@dataclass(frozen=True, slots=True)
class QuipDecoder:
    """QuIP weights: scaled codes whose rows and columns are rotated; any row takes all of them.

    Attributes:
        rotated: decodes the rotated weight.
        shape: the weight's shape.
        signs_out, signs_in: names of the rotations' signs.
    """

    rotated: ScaledDecoder
    shape: tuple[int, int]
    signs_out: str
    signs_in: str

    def basis(self, reader: UnifiedSafetensorsLoader) -> Basis:
        """The basis of the codes."""
        outputs = Rotation.from_signs(reader.get_tensor(self.signs_out))
        return QuipTransform(outputs, Rotation.from_signs(reader.get_tensor(self.signs_in)))

    def rows(self, reader: UnifiedSafetensorsLoader, start: int, stop: int) -> torch.Tensor:
        whole = self.rotated.rows(reader, 0, self.shape[0])
        return self.basis(reader).restore(whole.float())[start:stop].to(whole.dtype)


@dataclass(frozen=True, slots=True)
class Mxfp4Decoder:
    """gpt-oss experts: ``[E, in, out]`` from transposed blocks of 32; a row is an expert."""

    blocks: str
    scales: str

    def rows(self, reader: UnifiedSafetensorsLoader, start: int, stop: int) -> torch.Tensor:
        return decode_mxfp4(
            reader.get_rows(self.blocks, start, stop), reader.get_rows(self.scales, start, stop)
        )


@dataclass(frozen=True, slots=True)
class NvFp4Decoder:
    """NVFP4 ``[M, N]`` from uint8 pairs, E4M3 scales of 16 and one global factor.

    Attributes:
        packed, scales, global_scale: names of the stored tensors.
        divides: the global factor divides (compressed-tensors) instead of multiplying.
        comfyui: high nibble first, scales in tensor-core order.
        shape: the weight's own shape, without the padding of ``packed``.
    """

    packed: str
    scales: str
    global_scale: str
    shape: tuple[int, int]
    divides: bool = False
    comfyui: bool = False

    def rows(self, reader: UnifiedSafetensorsLoader, start: int, stop: int) -> torch.Tensor:
        packed = reader.get_rows(self.packed, start, stop)
        factor = reader.get_tensor(self.global_scale).float()
        if self.comfyui:
            stored = reader.get_tensor(self.scales).float()
            rows = reader.get_shape(self.packed)[0]
            scales = unswizzle_scales(stored, rows, packed.shape[1] // 8)[start:stop]
        else:
            scales = reader.get_rows(self.scales, start, stop)
        factor = factor.reciprocal() if self.divides else factor
        return decode_nvfp4(packed, scales, factor, high_first=self.comfyui)[:, : self.shape[1]]
