"""The transformers layout: a model directory that transformers and vLLM load.

``config.json`` gets a ``quantization_config`` in the compressed-tensors schema
(https://github.com/vllm-project/compressed-tensors, 0.19): one config group for
each format in use, every linear layer that stays as it was in ``ignore``. Codes
keep the name ``weight``; ``weight_scale`` is ``[1]``, ``[M, 1]``, ``[M, N/g]`` or
``[M/bs, N/bs]``.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from qwodel.algorithms.quant_types import FP8_E4M3, FP8_E5M2, INT8, ROW, TENSOR
from qwodel.checkpoint.files.dtypes import dtype_name
from qwodel.checkpoint.files.output_tensor import OutputTensor, Role
from qwodel.checkpoint.formats.storage_format import StorageFormat
from qwodel.checkpoint.layouts.layout import ReaderSupport
from qwodel.checkpoint.source.source_tensor import SourceTensor
from qwodel.exceptions import ConfigurationError

if TYPE_CHECKING:
    from qwodel.checkpoint.tensors import TensorPlan

__all__ = ["Activations", "TransformersLayout"]

Activations = Literal["dynamic", "static", "none"]

_VLLM_BLOCK = 128
_PACKED = 4  # INT8 codes in an int32
_EXPERT = re.compile(r"\.experts\.\d+\.")
_ANY_EXPERT = r"re:.*\.experts\.\d+\..*"


@dataclass(frozen=True, slots=True)
class TransformersLayout:
    """How model directories are written.

    Attributes:
        activations: ``"dynamic"`` lets the reader quantize activations token by
            token, as the fast kernels need; ``"static"`` has it take ``input_scales``;
            ``"none"`` describes weights only.
        input_scales: weight → scale of its layer's inputs, of static activations.
        packed_experts: write INT8 weights of experts four to an int32, the one integer form of
            experts that transformers takes; they are described as weights only.
    """

    activations: Activations = "dynamic"
    input_scales: Mapping[str, float] = field(default_factory=dict)
    packed_experts: bool = False

    def __post_init__(self) -> None:
        if self.activations not in ("dynamic", "static", "none"):
            raise ConfigurationError(
                f"activations are 'dynamic', 'static' or 'none', not {self.activations!r}"
            )
        if (self.activations == "static") != bool(self.input_scales):
            raise ConfigurationError("static activations, and only they, need input_scales")

    @property
    def name(self) -> str:
        return "transformers"

    @property
    def single_file(self) -> bool:
        return False

    def support(self, wanted: StorageFormat) -> ReaderSupport:
        reader = "transformers with compressed-tensors, vLLM"
        if wanted.quant_type is None:
            return ReaderSupport(True, reader)
        if wanted.quant_type == FP8_E5M2:
            raise ConfigurationError(
                "compressed-tensors has no FP8 E5M2, so no model directory can be written in it",
                hint="use fp8_e4m3, or the comfyui layout",
            )
        if wanted.convrot or wanted.quip_seed is not None:
            raise ConfigurationError(
                f"compressed-tensors readers do not rotate activations as {wanted.name} weights need",
                hint="use layout='comfyui', or the format int8_row",
            )
        granularity = wanted.granularity
        if wanted.quant_type == INT8 and granularity.is_block:
            return ReaderSupport(
                False, reader, "vLLM has no INT8 kernels with block scales; transformers decodes it"
            )
        if wanted.quant_type == INT8 and self.activations == "none":
            return ReaderSupport(
                False,
                reader,
                "vLLM reads INT8 weights without activation quantization only in its packed form",
            )
        if granularity.is_block and (granularity.block_rows, granularity.block_cols) != (
            _VLLM_BLOCK,
            _VLLM_BLOCK,
        ):
            return ReaderSupport(
                False, reader, "vLLM has FP8 kernels for 128×128 blocks only; transformers decodes it"
            )
        return ReaderSupport(True, reader)

    def obstacle(self, source: SourceTensor, wanted: StorageFormat) -> str | None:
        if not wanted.quantizes:
            return None
        granularity = wanted.granularity
        if self._packs(source.name, wanted):
            if source.shape[1] % _PACKED:
                return f"{source.shape[1]} inputs are no multiple of {_PACKED}, as packing needs"
            return None
        if _EXPERT.search(source.name) and (wanted.quant_type != FP8_E4M3 or granularity.is_block):
            return "transformers merges experts as it loads and takes FP8 with tensor or row scales only"
        if (
            self.activations == "dynamic"
            and granularity.is_block
            and source.shape[1] % granularity.block_cols
        ):
            return (
                f"{source.shape[1]} inputs are not whole activation groups of {granularity.block_cols}; "
                "with activations='none' there are none"
            )
        if self.activations == "static" and source.name not in self.input_scales:
            return "its layer's inputs have no static scale"
        return None

    def outputs(self, source: SourceTensor, wanted: StorageFormat) -> tuple[OutputTensor, ...]:
        assert wanted.quant_type is not None
        shape = wanted.granularity.scale_shape(source.shape) or (1,)
        if self._packs(source.name, wanted):
            rows, columns = source.shape
            return (
                OutputTensor(f"{source.name}_packed", "I32", (rows, columns // _PACKED), Role.CODES),
                OutputTensor(f"{source.name}_scale", "F32", shape, Role.SCALE),
                OutputTensor(
                    f"{source.name}_shape", "I64", (2,), Role.CONSTANT, struct.pack("<2q", rows, columns)
                ),
            )
        outputs = (
            OutputTensor(source.name, dtype_name(wanted.quant_type.dtype), source.shape, Role.CODES),
            OutputTensor(f"{source.name}_scale", "F32", shape, Role.SCALE),
        )
        if self.activations != "static":
            return outputs
        name, payload = f"{source.name.removesuffix('.weight')}.input_scale", self.input_scales[source.name]
        return (*outputs, OutputTensor(name, "F32", (1,), Role.CONSTANT, struct.pack("<f", payload)))

    def _packs(self, name: str, wanted: StorageFormat) -> bool:
        row_codes = wanted.quant_type == INT8 and wanted.granularity == ROW
        return self.packed_experts and row_codes and _EXPERT.search(name) is not None

    def extra_tensors(self, tensors: Sequence[TensorPlan]) -> tuple[OutputTensor, ...]:
        del tensors
        return ()

    def metadata(self, tensors: Sequence[TensorPlan], source: dict[str, str]) -> dict[str, str]:
        del tensors
        kept = {key: value for key, value in source.items() if key != "_quantization_metadata"}
        return {"format": "pt", **kept}

    def config(self, config: Mapping[str, Any], tensors: Iterable[TensorPlan]) -> dict[str, Any]:
        """Return the output's ``config.json``: the source's, with our ``quantization_config``."""
        written = {key: value for key, value in config.items() if key != "quantization_config"}
        plans = list(tensors)
        formats = _formats(plans)
        if formats:
            written["quantization_config"] = self._quantization(plans, formats)
        casts = {each.format.cast_to for each in plans if each.format and each.format.cast_to}
        if not formats and casts in ({"F16"}, {"BF16"}):
            dtype = {"F16": "float16", "BF16": "bfloat16"}[casts.pop() or ""]
            written = _with_dtype(written, dtype)
        return written

    def _quantization(self, plans: list[TensorPlan], formats: list[StorageFormat]) -> dict[str, Any]:
        # The commonest format takes every Linear; rarer ones are named layer by layer.
        groups: dict[str, dict[str, Any]] = {}
        for index, wanted in enumerate(formats):
            named = [
                f"re:^(.*\\.)?{re.escape(each.name.removesuffix('.weight'))}$"
                for each in plans
                if each.format == wanted and index
            ]
            groups[f"group_{index}"] = {"targets": named or ["Linear"], **self._scheme(wanted)}
        kept = _kept_layers(plans)
        packed = next(
            (each.format for each in plans if each.format and self._packs(each.name, each.format)), None
        )
        if packed is not None:
            groups[f"group_{len(groups)}"] = {
                "targets": [_ANY_EXPERT],
                **self._scheme(packed),
                "input_activations": None,
                "format": "pack-quantized",
            }
        elif formats[0].quant_type == INT8 and any(_EXPERT.search(f"{name}.") for name in kept):
            # transformers looks for packed experts where the experts' group is an integer one, and
            # would leave those stored as they were without values.
            fp8 = StorageFormat("experts", FP8_E4M3, ROW)
            groups[f"group_{len(groups)}"] = {"targets": [_ANY_EXPERT], **self._scheme(fp8)}
        labels = {str(group["format"]) for group in groups.values()}
        return {
            "config_groups": groups,
            "format": labels.pop() if len(labels) == 1 else "mixed-precision",
            "global_compression_ratio": None,
            "ignore": kept,
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }

    def _scheme(self, wanted: StorageFormat) -> dict[str, Any]:
        kind = "int" if wanted.quant_type == INT8 else "float"
        granularity = wanted.granularity
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
        if self.activations == "static":
            inputs |= {"strategy": "tensor", "dynamic": False}
        rounded = self.activations != "none"
        label = f"{kind}-quantized" if rounded else "naive-quantized"
        return {
            "weights": weights,
            "input_activations": inputs if rounded else None,
            "output_activations": None,
            "format": label,
        }


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """Return ``config.json`` as transformers lays it out."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    changed = {
        key: _with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()
    }
    for key in ("dtype", "torch_dtype"):
        if isinstance(changed.get(key), str):
            changed[key] = dtype
    return changed


def _kept_layers(plans: Sequence[TensorPlan]) -> list[str]:
    """Layers whose matrices are not quantized, and a head that shares its weight with the embedding."""
    kept = [
        each.name.removesuffix(".weight")
        for each in plans
        if each.name.endswith(".weight")
        and len(each.source.shape) == 2
        and not (each.format and each.format.quantizes)
    ]
    tied = not any(each.name.endswith("lm_head.weight") for each in plans)
    return [*kept, "lm_head"] if tied and not any(name.endswith("lm_head") for name in kept) else kept


def _formats(plans: list[TensorPlan]) -> list[StorageFormat]:
    """The quantizing formats in use, the commonest first."""
    counts: dict[StorageFormat, int] = {}
    for each in plans:
        if each.format and each.format.quantizes:
            counts[each.format] = counts.get(each.format, 0) + 1
    return sorted(counts, key=lambda wanted: (-counts[wanted], str(wanted.granularity), wanted.name))
