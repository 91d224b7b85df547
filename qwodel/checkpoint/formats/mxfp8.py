"""MXFP8: FP8 E4M3 codes with a power of two for each 32 of a row (E8M0, a byte of exponent).

OCP Microscaling specification 1.0. Exponents are rounded up, so that nothing saturates, as ComfyUI's kernels do:
with a floating-point grid a larger power of two costs no accuracy above the subnormals.
ComfyUI wants the exponents in tensor-core order, compressed-tensors (``mxfp8-quantized``) row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwodel.algorithms.quant_types import MXFP8_E4M3, Granularity
from qwodel.checkpoint.files.output_tensor import Role
from qwodel.checkpoint.formats.codec import (
    COMFYUI,
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
from qwodel.checkpoint.formats.swizzle import swizzle_scales, swizzled_shape, unswizzle_scales

__all__ = ["MXFP8", "Mxfp8", "Mxfp8Decoder", "recognise_mxfp8"]

_GROUP = 32
_BIAS = 127
_LABEL = "mxfp8"


@dataclass(frozen=True, slots=True)
class Mxfp8Decoder(ScaledDecoder):
    """E4M3 codes times two to the power of their group's exponent.

    Attributes:
        groups: the scales' own shape, ``[M, N/32]``.
        swizzled: they are stored in tensor-core order.
    """

    groups: tuple[int, int]
    swizzled: bool

    def factors(self, reader: TensorSource) -> torch.Tensor:
        """All scales as fp32 powers of two, ``[M, N/32]``, swizzled ones put in order."""
        stored = reader.get_tensor(self.scale).view(torch.uint8)
        exponents = unswizzle_scales(stored, *self.groups) if self.swizzled else stored
        return torch.ldexp(
            torch.ones(exponents.shape, dtype=torch.float32), exponents.to(torch.int32) - _BIAS
        )


@dataclass(frozen=True, slots=True)
class Mxfp8(Scaled):
    """Codes as ``weight``, exponents as ``weight_scale``."""

    def obstacle(self, shape: tuple[int, ...], dialect: Dialect) -> str | None:
        """Why not: columns (for ComfyUI rows too) that are no multiple of 32."""
        sides = shape if dialect == "comfyui" else shape[1:]  # ComfyUI pads both, and would load padding
        odd = next((side for side in sides if side % _GROUP), None)
        return None if odd is None else f"{odd} is no multiple of {_GROUP}, as MXFP8 needs"

    def parts(self, shape: tuple[int, ...], dialect: Dialect) -> tuple[Part, ...]:
        """E4M3 codes, and E8M0 scales as bytes: ``[M, N/32]``, or swizzled for ComfyUI."""
        groups = self.granularity.scale_shape(shape)
        stored = swizzled_shape(*groups) if dialect == "comfyui" else groups
        return (
            Part("weight", "F8_E4M3", shape, Role.CODES),
            Part("weight_scale", "U8", stored, Role.SCALE),
        )

    def encode_scales(self, scale: torch.Tensor, dialect: Dialect) -> Mapping[str, torch.Tensor]:
        """Exponents of the scales, biased by 127, in ComfyUI's order where it reads them."""
        # A power of two is its exponent: frexp gives half of it, times two to one more.
        exponents = (torch.frexp(scale).exponent + (_BIAS - 1)).to(torch.uint8)
        return {"weight_scale": swizzle_scales(exponents) if dialect == "comfyui" else exponents}

    def decoder(self, names: Mapping[str, str], shape: tuple[int, ...], dialect: Dialect) -> RowDecoder:
        """The decoder of codes with E8M0 scales of 32."""
        groups = (shape[0], shape[1] // _GROUP)
        return Mxfp8Decoder(names["weight"], names["weight_scale"], (1, _GROUP), groups, dialect == "comfyui")

    def comfyui(self) -> ReaderSupport:
        """ComfyUI loads it."""
        return ReaderSupport(True, COMFYUI)

    def comfyui_description(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The format's name: its groups are always 32."""
        del shape
        return {"format": _LABEL}

    @property
    def legacy_fp8(self) -> str | None:
        """Why not: those files have one scale a tensor."""
        return "legacy scaled FP8 files have one scale a tensor"

    def compressed_tensors(self, activations: Activations) -> ReaderSupport:
        """transformers loads it."""
        del activations
        return ReaderSupport(True, TRANSFORMERS)

    def scheme(self, activations: Activations) -> dict[str, Any]:
        """Groups of 32 with scales stored as ``torch.uint8``."""
        weights = {
            "num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": _GROUP,
            "scale_dtype": "torch.uint8",
        }  # fmt: skip
        return {
            "weights": {**weights, "dynamic": False},
            "input_activations": None if activations == "none" else {**weights, "dynamic": True},
            "output_activations": None,
            "format": "mxfp8-quantized",
        }

    @property
    def merges_experts(self) -> bool:
        """Never."""
        return False


MXFP8 = Mxfp8(
    "mxfp8",
    MXFP8_E4M3,
    Granularity.group(_GROUP),
    backend="fp8",
    description="FP8 E4M3, a power of two for each 32 weights of a row (OCP MX); computed in FP8 on Blackwell GPUs only",
    read_by="ComfyUI 0.18, transformers, vLLM",
    aliases=("mxfp8_e4m3", "fp8_mx"),
    nominal_bits=8.25,
)


def recognise_mxfp8(stored: StoredTensors, name: str) -> Recognised | None:
    """E4M3 codes beside bytes of exponent, in ComfyUI's order where a description says so.

    Raises:
        ValidationError: the shapes do not fit.
    """
    reader, scale = stored.reader, f"{name}_scale"
    if reader.entry(name).dtype != "F8_E4M3" or scale not in reader:
        return None
    entry, exponents = reader.entry(name), reader.entry(scale)
    swizzled = stored.description(name).get("format") == _LABEL
    if exponents.dtype not in ("U8", "F8_E8M0") or (exponents.dtype != "U8" and not swizzled):
        return None
    groups = (entry.shape[0], entry.shape[-1] // _GROUP) if len(entry.shape) == 2 else (0, 0)
    expected = swizzled_shape(*groups) if swizzled else groups
    if len(entry.shape) != 2 or entry.shape[1] % _GROUP or exponents.shape != expected:
        if not swizzled:
            return None
        raise stored.refusal(f"MXFP8 of an unknown layout (tensor {name!r})")
    decoder = Mxfp8Decoder(name, scale, (1, _GROUP), groups, swizzled)
    return Recognised(name, entry.shape, (name, scale), decoder, "MXFP8")
