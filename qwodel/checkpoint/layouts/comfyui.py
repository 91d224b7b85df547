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
from dataclasses import dataclass, replace
from typing import Any

from qwodel.algorithms.quant_types import INT8
from qwodel.checkpoint.files.dtypes import TORCH_DTYPES
from qwodel.checkpoint.files.output_tensor import OutputTensor, Role
from qwodel.checkpoint.files.writer import FilePlan
from qwodel.checkpoint.formats.codec import Codec, ReaderSupport
from qwodel.checkpoint.source.source_tensor import SourceTensor
from qwodel.checkpoint.tensors import Storage, TensorPlan
from qwodel.exceptions import ConfigurationError

__all__ = ["ComfyUILayout"]

_LEGACY = {"weight_scale": "scale_weight", "input_scale": "scale_input"}


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
        """``comfyui``."""
        return "comfyui"

    @property
    def single_file(self) -> bool:
        """Always: ComfyUI loads a module from one file."""
        return True

    @property
    def needs_config(self) -> bool:
        """Never: layers describe themselves."""
        return False

    def support(self, wanted: Codec) -> ReaderSupport:
        """Whether ComfyUI loads ``wanted``.

        Raises:
            ConfigurationError: legacy files cannot hold it.
        """
        found = wanted.comfyui()
        if not self.legacy or not wanted.quantizes:
            return found
        if wanted.rotates:
            raise ConfigurationError(
                "legacy files cannot say that weights are rotated",
                hint="drop the legacy layout, or use int8_row",
            )
        reason = wanted.legacy_fp8
        return ReaderSupport(False, found.reader, reason) if reason else found

    def obstacle(self, source: SourceTensor, wanted: Codec) -> str | None:
        """Why this weight's shape cannot be had in ``wanted``; ``None`` where it can."""
        return wanted.obstacle(source.shape, "comfyui")

    def storage(self, source: SourceTensor, wanted: Codec) -> Storage:
        """``wanted`` itself, in ComfyUI's dialect."""
        del source
        return Storage(wanted, "comfyui")

    def outputs(self, source: SourceTensor, wanted: Codec) -> tuple[OutputTensor, ...]:
        """The codec's parts, an input scale where asked for, and ``.comfy_quant``; legacy files name scales otherwise."""
        layer = source.name.removesuffix(".weight")
        tensors = list(self.storage(source, wanted).outputs(layer, source.shape))
        if self.input_scale:
            self._check_input_scale(wanted)
            one = struct.pack("<f", 1.0)
            tensors.append(OutputTensor(f"{layer}.input_scale", "F32", (), Role.CONSTANT, one, "input_scale"))
        if self.legacy:
            return tuple(
                replace(tensor, name=f"{layer}.{_LEGACY.get(tensor.local, tensor.local)}")
                for tensor in tensors
            )
        text = json.dumps(self.description(source, wanted)).encode()
        return (*tensors, OutputTensor(f"{layer}.comfy_quant", "U8", (len(text),), Role.CONSTANT, text))

    def description(self, source: SourceTensor, wanted: Codec) -> dict[str, Any]:
        """Return the JSON object that describes one layer."""
        description = wanted.comfyui_description(source.shape)
        if not description:
            return {}
        description["orig_dtype"] = str(TORCH_DTYPES[source.dtype])
        if self.full_precision_matrix_mult:
            description["full_precision_matrix_mult"] = True
        return description

    def extra_tensors(self, tensors: Sequence[TensorPlan]) -> tuple[OutputTensor, ...]:
        """The marker ``scaled_fp8`` of legacy files; none else."""
        if not self.legacy or not any(each.format and each.format.quantizes for each in tensors):
            return ()
        # Two elements ask for full-precision matrix products, none for FP8 ones.
        count = 2 if self.full_precision_matrix_mult else 0
        return (OutputTensor("scaled_fp8", "F8_E4M3", (count,), Role.CONSTANT, bytes(count)),)

    def metadata(self, tensors: Sequence[TensorPlan], source: dict[str, str]) -> dict[str, str]:
        """The source's metadata, with a description of each layer where asked for."""
        kept = {key: value for key, value in source.items() if key != "_quantization_metadata"}
        if self.header_metadata:
            layers = {
                each.name.removesuffix(".weight"): self.description(each.source, each.format)
                for each in tensors
                if each.format and each.format.quantizes
            }
            kept["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
        return kept

    def documents(
        self, config: Mapping[str, Any], tensors: Sequence[TensorPlan], files: Sequence[FilePlan]
    ) -> dict[str, bytes]:
        """None."""
        del config, tensors, files
        return {}

    def _check_input_scale(self, wanted: Codec) -> None:
        if wanted.quant_type == INT8 and not wanted.granularity.is_block and not self.legacy:
            raise ConfigurationError(
                "ComfyUI quantizes the activations of int8_tensorwise layers as they come and reads no input_scale",
                hint="drop include_input_scale",
            )
