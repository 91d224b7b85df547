"""FP8 and INT8 codes with one fp32 scale for each tensor, row, group or block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwodel.algorithms.fp8_decode import codes_to_float
from qwodel.algorithms.quant_types import FP8_E4M3, FP8_E5M2, INT8, ROW, TENSOR, Granularity
from qwodel.checkpoint.files.dtypes import FLOAT_DTYPES, dtype_name
from qwodel.checkpoint.files.output_tensor import Role
from qwodel.checkpoint.formats.codec import (
    COMFYUI,
    TRANSFORMERS,
    Activations,
    Codec,
    Dialect,
    Part,
    ReaderSupport,
    RowDecoder,
    TensorSource,
)
from qwodel.checkpoint.formats.stated import FP8_DTYPES, Recognised, StoredTensors
from qwodel.exceptions import ConfigurationError

__all__ = [
    "FP8_BLOCK",
    "FP8_E5M2_TENSOR",
    "FP8_ROW",
    "FP8_TENSOR",
    "INT8_BLOCK",
    "INT8_ROW",
    "INT8_TENSOR",
    "Scaled",
    "ScaledDecoder",
    "recognise_scaled",
    "scaled_codes",
]

_VLLM_BLOCK = 128
_NEEDS_NODES = "ComfyUI has no such format; only third-party nodes such as ComfyUI-QuantOps may read it"
_COMFYUI = {
    (FP8_E4M3, "tensor"): ("float8_e4m3fn", True),
    (FP8_E5M2, "tensor"): ("float8_e5m2", True),
    (FP8_E4M3, "row"): ("float8_e4m3fn_rowwise", False),
    (FP8_E4M3, "block"): ("float8_e4m3fn_blockwise", False),
    (INT8, "tensor"): ("int8_tensorwise", True),
    (INT8, "row"): ("int8_tensorwise", True),
    (INT8, "block"): ("int8_blockwise", False),
}
"""(number type, kind of scale) → ComfyUI's word for it, and whether ComfyUI as distributed loads it."""


@dataclass(frozen=True, slots=True)
class ScaledDecoder(RowDecoder):
    """Codes times a dequant scale: fp32 rows.

    Attributes:
        data: FP8 or INT8 codes of any shape.
        scale: dequant factors, one for every ``block`` of codes.
        block: codes a scale covers along each dimension.
    """

    data: str
    scale: str
    block: tuple[int, ...]

    @property
    def scaled(self) -> ScaledDecoder:
        """Itself."""
        return self

    def rows(self, reader: TensorSource, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` in fp32: codes times scales."""
        codes = self.codes(reader, start, stop)
        return codes.mul_(self.spread(self.factors(reader), start, stop, codes.shape))

    def codes(self, reader: TensorSource, start: int, stop: int) -> torch.Tensor:
        """The codes of rows ``[start, stop)`` in fp32."""
        return codes_to_float(reader.get_rows(self.data, start, stop))

    def factors(self, reader: TensorSource) -> torch.Tensor:
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
class Scaled(Codec):
    """Codes as ``weight``, scales as ``weight_scale``."""

    def parts(self, shape: tuple[int, ...], dialect: Dialect) -> tuple[Part, ...]:
        """Codes ``[M, N]`` and their fp32 scales; a tensor's one scale is ``[]`` for ComfyUI, else ``[1]``."""
        assert self.quant_type is not None
        scale = self.granularity.scale_shape(shape)
        if dialect == "compressed-tensors":
            scale = scale or (1,)
        return (
            Part("weight", dtype_name(self.quant_type.dtype), shape, Role.CODES),
            Part("weight_scale", "F32", scale, Role.SCALE),
        )

    def encode_codes(self, codes: torch.Tensor, dialect: Dialect) -> Mapping[str, torch.Tensor]:
        """The codes as they are, under ``weight``."""
        del dialect
        return {"weight": codes}

    def encode_scales(self, scale: torch.Tensor, dialect: Dialect) -> Mapping[str, torch.Tensor]:
        """The scales as they are, under ``weight_scale``."""
        del dialect
        return {"weight_scale": scale}

    def decoder(self, names: Mapping[str, str], shape: tuple[int, ...], dialect: Dialect) -> RowDecoder:
        """The decoder of codes with fp32 scales of the format's granularity."""
        del dialect
        block = (self.granularity.block_rows or shape[0], self.granularity.block_cols or shape[1])
        return ScaledDecoder(names["weight"], names["weight_scale"], block)

    def bound(self, codes: torch.Tensor, scale: torch.Tensor, slack: float = 0.0) -> torch.Tensor:
        """Half a step: scale/2 of an integer; for FP8 half the distance between the code's neighbours."""
        quant_type = self.quant_type
        assert quant_type is not None
        # What fp32 division and product add grows with the code.
        if not quant_type.is_float:
            return scale * (0.5 + 2e-6 * quant_type.qmax + slack * quant_type.qmax)
        # Clearing an fp32's sign and mantissa bits leaves the power of two below it.
        codes.view(torch.int32).bitwise_and_(0x7F800000)
        power = codes.clamp_(min=2.0**quant_type.min_exponent)
        half_step = 2.0 ** (-quant_type.mantissa_bits - 1) * (1 + 6e-5)
        if slack:
            return power.mul_(half_step).add_(slack * quant_type.qmax).mul_(scale)
        return power.mul_(scale * half_step)

    def _comfyui(self) -> tuple[str, bool]:
        granularity = self.granularity
        square = granularity.block_rows == granularity.block_cols
        kind = str(granularity) if not granularity.is_block else "block" if square else "group"
        found = _COMFYUI.get((self.quant_type, kind)) if self.quant_type else None
        if found is None:
            raise ConfigurationError(
                f"the ComfyUI layout has no way to write {self.quant_type} with {granularity} scales",
                hint="use the transformers layout, or another format",
            )
        return found

    def comfyui(self) -> ReaderSupport:
        """Whether ComfyUI loads it as distributed, or with additional nodes only."""
        loads = self._comfyui()[1]
        return ReaderSupport(loads, COMFYUI, "" if loads else _NEEDS_NODES)

    def comfyui_description(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """``format``, with ``group_size`` of blocks and ``per_row`` of INT8 rows."""
        description: dict[str, Any] = {"format": self._comfyui()[0]}
        if self.granularity.is_block:
            description["group_size"] = self.granularity.block_cols
        if self.quant_type == INT8 and self.granularity == ROW:
            description["per_row"] = True
        return description

    @property
    def legacy_fp8(self) -> str | None:
        """Why not: other codes than E4M3, or more than one scale."""
        if self.quant_type != FP8_E4M3:
            return "legacy scaled files are read as FP8 E4M3 only"
        return None if self.granularity == TENSOR else "legacy scaled FP8 files have one scale a tensor"

    def compressed_tensors(self, activations: Activations) -> ReaderSupport:
        """Whether vLLM and transformers load it.

        Raises:
            ConfigurationError: E5M2 codes, or inputs that no scheme rounds so.
        """
        granularity = self.granularity
        if self.quant_type == FP8_E5M2:
            raise ConfigurationError(
                "compressed-tensors has no FP8 E5M2, so no model directory can be written in it",
                hint="use fp8_e4m3, or the comfyui layout",
            )
        reason = ""
        if self.quant_type == INT8 and granularity.is_block:
            reason = "vLLM has no INT8 kernels with block scales; transformers decodes it"
        elif self.quant_type == INT8 and activations == "none":
            reason = "vLLM reads INT8 weights without activation quantization only in its packed form"
        elif granularity.is_block and granularity != Granularity.block(_VLLM_BLOCK):
            reason = "vLLM has FP8 kernels for 128×128 blocks only; transformers decodes it"
        return ReaderSupport(not reason, TRANSFORMERS, reason)

    def scheme(self, activations: Activations) -> dict[str, Any]:
        """8-bit weights and inputs of this granularity, symmetric."""
        kind = "int" if self.quant_type == INT8 else "float"
        granularity = self.granularity
        weights: dict[str, Any] = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": False}
        inputs: dict[str, Any] = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True}
        inputs["strategy"] = "token"
        if granularity == TENSOR:
            weights["strategy"] = "tensor"
        elif granularity == ROW:
            weights["strategy"] = "channel"
        elif granularity.block_rows == 1:
            weights |= {"strategy": "group", "group_size": granularity.block_cols}
        else:
            weights |= {
                "strategy": "block",
                "block_structure": [granularity.block_rows, granularity.block_cols],
            }
            inputs |= {"strategy": "group", "group_size": granularity.block_cols}
        if activations == "static":
            inputs |= {"strategy": "tensor", "dynamic": False}
        rounded = activations != "none"
        return {
            "weights": weights,
            "input_activations": inputs if rounded else None,
            "output_activations": None,
            "format": f"{kind}-quantized" if rounded else "naive-quantized",
        }

    @property
    def merges_experts(self) -> bool:
        """Whether it is FP8 E4M3 with tensor or row scales."""
        return self.quant_type == FP8_E4M3 and not self.granularity.is_block


FP8_TENSOR = Scaled(
    "fp8_e4m3",
    FP8_E4M3,
    TENSOR,
    backend="fp8",
    description="FP8 E4M3, one scale a tensor: the FP8 that ComfyUI, vLLM and transformers all load",
    read_by="ComfyUI, vLLM, transformers",
    aliases=("fp8", "fp8_e4m3fn", "fp8_tensor"),
)

FP8_ROW = Scaled(
    "fp8_e4m3_row",
    FP8_E4M3,
    ROW,
    backend="fp8",
    description="FP8 E4M3, one scale a row: a little more accurate; as a single file NOT loadable by stock ComfyUI",
    read_by="vLLM, transformers",
    aliases=("fp8_row",),
)

FP8_BLOCK = Scaled(
    "fp8_e4m3_block",
    FP8_E4M3,
    Granularity.block(128),
    backend="fp8",
    description="FP8 E4M3, one scale a 128×128 block, as DeepSeek; as a single file NOT loadable by stock ComfyUI",
    read_by="vLLM, transformers",
    aliases=("fp8_block",),
)

FP8_E5M2_TENSOR = Scaled(
    "fp8_e5m2",
    FP8_E5M2,
    TENSOR,
    backend="fp8",
    description="FP8 E5M2, one scale a tensor: one bit of mantissa less than E4M3, more range; single file only",
    read_by="ComfyUI",
)

INT8_ROW = Scaled(
    "int8_row",
    INT8,
    ROW,
    backend="int8",
    description="INT8, one scale a row: the accurate INT8 that ComfyUI, vLLM and transformers all load",
    read_by="ComfyUI, vLLM, transformers",
    aliases=("int8", "w8a8"),
)

INT8_TENSOR = Scaled(
    "int8_tensor",
    INT8,
    TENSOR,
    backend="int8",
    description="INT8, one scale a tensor: less accurate than row scales",
    read_by="ComfyUI, vLLM, transformers",
)

INT8_BLOCK = Scaled(
    "int8_block",
    INT8,
    Granularity.block(128),
    backend="int8",
    description="INT8, one scale a 128×128 block: NOT loadable by stock ComfyUI or vLLM",
    read_by="transformers, ComfyUI-QuantOps",
)


def recognise_scaled(stored: StoredTensors, name: str) -> Recognised | None:
    """FP8 or INT8 codes beside a scale of any of its names."""
    return scaled_codes(stored, name)


def scaled_codes(stored: StoredTensors, name: str) -> Recognised | None:
    """:func:`recognise_scaled`, for formats that are the same with something more.

    Raises:
        ValidationError: the scales are of a dtype or shape that leaves a doubt.
    """
    entry, scale = stored.reader.entry(name), stored.scale_of(name)
    if scale is None or (entry.dtype not in FP8_DTYPES and entry.dtype != "I8"):
        return None
    kind = "INT8" if entry.dtype == "I8" else entry.dtype.replace("F8_", "FP8 ")
    scales = stored.reader.entry(scale)
    if scales.dtype not in FLOAT_DTYPES and scales.dtype != "F8_E8M0":
        raise stored.refusal(f"{kind} with {scales.dtype} scales (tensor {scale!r})")
    block = stored.block(name, entry.shape, scales.shape)
    shared = "tensor" if scales.numel == 1 else "row" if block[1:] == entry.shape[1:] else "block"
    decoder = ScaledDecoder(name, scale, block)
    return Recognised(name, entry.shape, (name, scale), decoder, f"{kind} {shared}")
