"""The ComfyUI layout: one safetensors file whose layers describe themselves.

Beside the codes of ``<layer>.weight`` stand ``<layer>.weight_scale`` (fp32
dequant scale) and ``<layer>.comfy_quant`` (uint8, JSON). A header entry
``_quantization_metadata`` may repeat the descriptions; ComfyUI lets it override
the tensors, so both are written from one source. The legacy form, before those
descriptions, has ``<layer>.scale_weight`` and a marker tensor ``scaled_fp8``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from qwodel.algorithms.quant_types import FP8_E4M3, FP8_E5M2, INT8, ROW, TENSOR, QuantType
from qwodel.algorithms.quip import QuipTransform
from qwodel.checkpoint.files.dtypes import TORCH_DTYPES, dtype_name
from qwodel.checkpoint.files.output_tensor import OutputTensor, Role
from qwodel.checkpoint.formats.storage_format import StorageFormat
from qwodel.checkpoint.layouts.layout import ReaderSupport
from qwodel.checkpoint.source.source_tensor import SourceTensor
from qwodel.exceptions import ConfigurationError

if TYPE_CHECKING:
    from qwodel.checkpoint.tensors import TensorPlan

__all__ = ["COMFYUI_FORMATS", "ComfyFormat", "ComfyUILayout"]


@dataclass(frozen=True, slots=True)
class ComfyFormat:
    """A format's name in ComfyUI, and whether ComfyUI as distributed loads it."""

    label: str
    loads: bool
    reason: str = ""


_NEEDS_NODES = "ComfyUI has no such format; only third-party nodes such as ComfyUI-QuantOps may read it"

COMFYUI_FORMATS: Mapping[tuple[QuantType, str], ComfyFormat] = MappingProxyType(
    {
        (FP8_E4M3, "tensor"): ComfyFormat("float8_e4m3fn", True),
        (FP8_E5M2, "tensor"): ComfyFormat("float8_e5m2", True),
        (FP8_E4M3, "row"): ComfyFormat("float8_e4m3fn_rowwise", False, _NEEDS_NODES),
        (FP8_E4M3, "block"): ComfyFormat("float8_e4m3fn_blockwise", False, _NEEDS_NODES),
        (INT8, "tensor"): ComfyFormat("int8_tensorwise", True),
        (INT8, "row"): ComfyFormat("int8_tensorwise", True),
        (INT8, "block"): ComfyFormat("int8_blockwise", False, _NEEDS_NODES),
    }
)
"""(number type, kind of scale) → the ComfyUI format."""


@dataclass(frozen=True, slots=True)
class ComfyUILayout:
    """How ComfyUI files are written.

    Attributes:
        full_precision_matrix_mult: ask ComfyUI to compute with de-quantized weights.
        input_scale: write an activation scale of 1.0 beside each quantized weight;
            an error for INT8 tensor and row layers, whose activations ComfyUI
            quantizes as they come.
        header_metadata: repeat the descriptions in the header.
        legacy: write ``scale_weight`` and ``scaled_fp8`` instead of descriptions.
    """

    full_precision_matrix_mult: bool = False
    input_scale: bool = False
    header_metadata: bool = False
    legacy: bool = False

    def __post_init__(self) -> None:
        if self.legacy and self.header_metadata:
            raise ConfigurationError(
                "legacy files have no quantization metadata",
                hint="drop save_quant_metadata, or the legacy layout",
            )

    @property
    def name(self) -> str:
        return "comfyui"

    @property
    def single_file(self) -> bool:
        return True

    def support(self, wanted: StorageFormat) -> ReaderSupport:
        found = self._format(wanted)
        if found is None:
            return ReaderSupport(True, "ComfyUI")
        if self.legacy and (wanted.convrot or wanted.quip_seed is not None):
            raise ConfigurationError(
                "legacy files cannot say that weights are rotated",
                hint="drop the legacy layout, or use int8_row",
            )
        if self.legacy and wanted.quant_type != FP8_E4M3:
            return ReaderSupport(False, "ComfyUI", "legacy scaled files are read as FP8 E4M3 only")
        if self.legacy and wanted.granularity != TENSOR:
            return ReaderSupport(False, "ComfyUI", "legacy scaled FP8 files have one scale a tensor")
        return ReaderSupport(found.loads, "ComfyUI", found.reason)

    def obstacle(self, source: SourceTensor, wanted: StorageFormat) -> str | None:
        del source, wanted
        return None

    def outputs(self, source: SourceTensor, wanted: StorageFormat) -> tuple[OutputTensor, ...]:
        assert wanted.quant_type is not None
        layer = source.name.removesuffix(".weight")
        scale_shape = wanted.granularity.scale_shape(source.shape)
        codes = OutputTensor(source.name, dtype_name(wanted.quant_type.dtype), source.shape, Role.CODES)
        scale_name = f"{layer}.scale_weight" if self.legacy else f"{layer}.weight_scale"
        tensors = [codes, OutputTensor(scale_name, "F32", scale_shape, Role.SCALE)]
        if self.input_scale:
            self._check_input_scale(wanted)
            name = f"{layer}.scale_input" if self.legacy else f"{layer}.input_scale"
            tensors.append(OutputTensor(name, "F32", (), Role.CONSTANT, struct.pack("<f", 1.0)))
        basis = wanted.basis(source.shape) if wanted.quip_seed is not None else None
        if isinstance(basis, QuipTransform):
            for side, rotation in (("out", basis.outputs), ("in", basis.inputs)):
                assert rotation is not None
                signs = rotation.signs.to(torch.int8).numpy().tobytes()
                name = f"{layer}.quip_signs_{side}"
                tensors.append(OutputTensor(name, "I8", (rotation.size,), Role.CONSTANT, signs))
        if not self.legacy:
            text = json.dumps(self.description(source, wanted)).encode()
            tensors.append(OutputTensor(f"{layer}.comfy_quant", "U8", (len(text),), Role.CONSTANT, text))
        return tuple(tensors)

    def description(self, source: SourceTensor, wanted: StorageFormat) -> dict[str, Any]:
        """Return the JSON object that describes one layer."""
        found = self._format(wanted)
        if found is None:
            return {}
        description: dict[str, Any] = {"format": found.label}
        if wanted.granularity.is_block:
            description["group_size"] = wanted.granularity.block_cols
        if wanted.quant_type == INT8 and wanted.granularity == ROW:
            description["per_row"] = True
        if size := wanted.convrot_size(source.shape[1]):
            description |= {"convrot": True, "convrot_groupsize": size}
        description["orig_dtype"] = str(TORCH_DTYPES[source.dtype])
        if self.full_precision_matrix_mult:
            description["full_precision_matrix_mult"] = True
        return description

    def extra_tensors(self, tensors: Sequence[TensorPlan]) -> tuple[OutputTensor, ...]:
        if not self.legacy or not any(each.format and each.format.quantizes for each in tensors):
            return ()
        # Two elements ask for full-precision matrix products, none for FP8 ones.
        count = 2 if self.full_precision_matrix_mult else 0
        return (OutputTensor("scaled_fp8", "F8_E4M3", (count,), Role.CONSTANT, bytes(count)),)

    def metadata(self, tensors: Sequence[TensorPlan], source: dict[str, str]) -> dict[str, str]:
        kept = {key: value for key, value in source.items() if key != "_quantization_metadata"}
        if self.header_metadata:
            layers = {
                each.name.removesuffix(".weight"): self.description(each.source, each.format)
                for each in tensors
                if each.format and each.format.quantizes
            }
            kept["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
        return kept

    def _format(self, wanted: StorageFormat) -> ComfyFormat | None:
        if wanted.quant_type is None:
            return None
        if wanted.quip_seed is not None:
            return ComfyFormat(
                "int8_quip", False, "its codes are rotated; qwodel.int8.read_weights decodes them"
            )
        granularity = wanted.granularity
        square = granularity.block_rows == granularity.block_cols
        kind = str(granularity) if not granularity.is_block else "block" if square else "group"
        found = COMFYUI_FORMATS.get((wanted.quant_type, kind))
        if found is None:
            raise ConfigurationError(
                f"the ComfyUI layout has no way to write {wanted.quant_type} with {granularity} scales",
                hint="use the transformers layout, or another format",
            )
        return found

    def _check_input_scale(self, wanted: StorageFormat) -> None:
        if wanted.quant_type == INT8 and not wanted.granularity.is_block and not self.legacy:
            raise ConfigurationError(
                "ComfyUI quantizes the activations of int8_tensorwise layers as they come and reads no input_scale",
                hint="drop include_input_scale",
            )
