"""Decoding the 4-bit floating-point formats that checkpoints come in: MXFP4 and NVFP4.

E2M1 values after the OCP Microscaling specification 1.0; MXFP4 blocks as
gpt-oss stores them (32 values and one E8M0 exponent); NVFP4 blocks as ModelOpt
and compressed-tensors store them (16 values and one E4M3 scale).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwodel.checkpoint.formats.codec import RowDecoder, TensorSource
from qwodel.checkpoint.formats.stated import Recognised, StoredTensors
from qwodel.checkpoint.formats.swizzle import unswizzle_scales

__all__ = [
    "E2M1_VALUES",
    "Mxfp4Decoder",
    "NvFp4Decoder",
    "decode_mxfp4",
    "decode_nvfp4",
    "recognise_mxfp4",
    "recognise_nvfp4",
]

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each 4-bit code; the high bit is the sign."""


def _values(packed: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    """uint8 ``[…, n]`` → fp32 ``[…, 2n]``; the first value of each byte is in its low nibble unless said otherwise."""
    table = torch.tensor(E2M1_VALUES, dtype=torch.float32)
    low, high = table[(packed & 0x0F).long()], table[(packed >> 4).long()]
    pair = (high, low) if high_first else (low, high)
    return torch.stack(pair, dim=-1).flatten(-2)


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Decode gpt-oss blocks to bf16, which holds every value exactly.

    Args:
        blocks: uint8 ``[E, rows, G, 16]``, two values a byte.
        scales: uint8 ``[E, rows, G]``, exponents with bias 127.

    Returns:
        ``[E, G·32, rows]``: the experts' matrices are stored transposed.
    """
    exponent = scales.to(torch.int32) - 127
    values = torch.ldexp(_values(blocks), exponent.unsqueeze(-1))
    return values.flatten(-2).transpose(-1, -2).contiguous().to(torch.bfloat16)


def decode_nvfp4(
    packed: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor, *, high_first: bool = False
) -> torch.Tensor:
    """Decode NVFP4 to fp32.

    Args:
        packed: uint8 ``[M, N/2]``.
        scales: ``[M, N/16]``, E4M3 (as stored or already fp32).
        global_scale: one fp32 *dequant* factor for the whole matrix.
        high_first: the first of two values is in the high nibble (ComfyUI's order).
    """
    values = _values(packed, high_first=high_first).reshape(*packed.shape[:-1], -1, 16)
    scale = scales.float() * global_scale.float().reshape(())
    decoded: torch.Tensor = values * scale.unsqueeze(-1)
    return decoded.flatten(-2)


@dataclass(frozen=True, slots=True)
class Mxfp4Decoder(RowDecoder):
    """gpt-oss experts: ``[E, in, out]`` from transposed blocks of 32; a row is an expert."""

    blocks: str
    scales: str

    def rows(self, reader: TensorSource, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` in fp32: 4-bit E2M1 codes times E8M0 scales of 32."""
        return decode_mxfp4(
            reader.get_rows(self.blocks, start, stop), reader.get_rows(self.scales, start, stop)
        )


@dataclass(frozen=True, slots=True)
class NvFp4Decoder(RowDecoder):
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

    def rows(self, reader: TensorSource, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` in fp32: 4-bit E2M1 codes times E4M3 scales of 16 and one fp32 factor."""
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


def recognise_mxfp4(stored: StoredTensors, name: str) -> Recognised | None:
    """gpt-oss's experts: ``…_blocks`` beside ``…_scales``.

    Raises:
        ValidationError: their dtypes or shapes are others.
    """
    stem, reader = name.removesuffix("_blocks"), stored.reader
    scales = f"{stem}_scales"
    if stem == name or scales not in reader:
        return None
    blocks, exponents = reader.entry(name), reader.entry(scales)
    if (
        (blocks.dtype, exponents.dtype) != ("U8", "U8")
        or len(blocks.shape) != 4
        or (blocks.shape[:3] != exponents.shape or blocks.shape[3] != 16)
    ):
        raise stored.refusal(f"blocks of an unknown layout (tensor {name!r})")
    experts, rows, groups, _ = blocks.shape
    shape = (experts, groups * 32, rows)
    return Recognised(stem, shape, (name, scales), Mxfp4Decoder(name, scales), "MXFP4", "BF16")


def recognise_nvfp4(stored: StoredTensors, name: str) -> Recognised | None:
    """Pairs of nibbles beside E4M3 scales and a global factor, in ModelOpt's, compressed-tensors' or ComfyUI's names.

    Raises:
        ValidationError: the shapes fit none of them.
    """
    reader = stored.reader
    if reader.entry(name).dtype != "U8" or len(reader.get_shape(name)) != 2:
        return None
    stem = name.removesuffix("_packed")
    scales = f"{stem}_scale"
    divides = stem != name
    factor = f"{stem}_global_scale" if divides else f"{stem}_scale_2"
    if scales not in reader or factor not in reader or reader.entry(scales).dtype != "F8_E4M3":
        return None
    rows, half = reader.get_shape(name)
    shape = (rows, half * 2)
    description = stored.description(name)
    swizzled = description.get("format") == "nvfp4"
    expected = (-(-rows // 128) * 128, -(-half // 32) * 4) if swizzled else (rows, half // 8)
    original = tuple(description.get("orig_shape") or shape)
    if reader.get_shape(scales) != expected or original != shape:
        raise stored.refusal(f"NVFP4 of an unknown layout (tensor {name!r})")
    decoder = NvFp4Decoder(name, scales, factor, shape, divides, swizzled)
    return Recognised(stem, shape, (name, scales, factor), decoder, "NVFP4")
