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
from typing import Any

from qwodel.algorithms.quant_types import INT8
from qwodel.checkpoint.files.output_tensor import OutputTensor, Role
from qwodel.checkpoint.files.writer import FilePlan, index_bytes
from qwodel.checkpoint.formats.codec import Activations, Codec, ReaderSupport
from qwodel.checkpoint.formats.packed import PACKED_INT8
from qwodel.checkpoint.formats.scaled import FP8_ROW, INT8_ROW
from qwodel.checkpoint.source.source_tensor import SourceTensor
from qwodel.checkpoint.tensors import Storage, TensorPlan
from qwodel.exceptions import ConfigurationError

__all__ = ["Activations", "TransformersLayout"]

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
        """``transformers``."""
        return "transformers"

    @property
    def single_file(self) -> bool:
        """Never: files are sharded."""
        return False

    @property
    def needs_config(self) -> bool:
        """Always: it holds ``quantization_config``."""
        return True

    def support(self, wanted: Codec) -> ReaderSupport:
        """Whether vLLM and transformers load ``wanted`` with inputs rounded as asked.

        Raises:
            ConfigurationError: compressed-tensors has no words for it.
        """
        return wanted.compressed_tensors(self.activations)

    def obstacle(self, source: SourceTensor, wanted: Codec) -> str | None:
        """Why this weight's shape, or its being an expert, keeps it out of ``wanted``; ``None`` where nothing does."""
        if not wanted.quantizes:
            return None
        stored = self.storage(source, wanted).codec
        if reason := stored.obstacle(source.shape, "compressed-tensors"):
            return reason
        if _EXPERT.search(source.name):
            if not stored.merges_experts:
                return "transformers merges experts as it loads and takes FP8 with tensor or row scales only"
            if stored is PACKED_INT8:
                return None
        granularity = wanted.granularity
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

    def storage(self, source: SourceTensor, wanted: Codec) -> Storage:
        """``wanted``, or packed words for experts in INT8 rows where they are packed."""
        packs = self.packed_experts and wanted == INT8_ROW and _EXPERT.search(source.name)
        return Storage(PACKED_INT8 if packs else wanted, "compressed-tensors")

    def outputs(self, source: SourceTensor, wanted: Codec) -> tuple[OutputTensor, ...]:
        """The codec's parts, and fp32 ``input_scale`` ``[1]`` where inputs have a static one."""
        layer, storage = source.name.removesuffix(".weight"), self.storage(source, wanted)
        outputs = storage.outputs(layer, source.shape)
        if self.activations != "static" or storage.codec is PACKED_INT8:
            return outputs
        payload = struct.pack("<f", self.input_scales[source.name])
        return (*outputs, OutputTensor(f"{layer}.input_scale", "F32", (1,), Role.CONSTANT, payload))

    def extra_tensors(self, tensors: Sequence[TensorPlan]) -> tuple[OutputTensor, ...]:
        """None."""
        del tensors
        return ()

    def metadata(self, tensors: Sequence[TensorPlan], source: dict[str, str]) -> dict[str, str]:
        """The source's metadata, and ``format: pt``, which transformers asks for."""
        del tensors
        kept = {key: value for key, value in source.items() if key != "_quantization_metadata"}
        return {"format": "pt", **kept}

    def documents(
        self, config: Mapping[str, Any], tensors: Sequence[TensorPlan], files: Sequence[FilePlan]
    ) -> dict[str, bytes]:
        """``config.json`` with the quantization described, and the index of several files."""
        documents = {"config.json": config_bytes(self.config(config, tensors))}
        if len(files) > 1:
            documents["model.safetensors.index.json"] = index_bytes(files)
        return documents

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

    def _quantization(self, plans: list[TensorPlan], formats: list[Codec]) -> dict[str, Any]:
        # The commonest format takes every Linear; rarer ones are named layer by layer.
        groups: dict[str, dict[str, Any]] = {}
        for index, wanted in enumerate(formats):
            named = [
                f"re:^(.*\\.)?{re.escape(each.name.removesuffix('.weight'))}$"
                for each in plans
                if each.format == wanted and index
            ]
            groups[f"group_{index}"] = {
                "targets": named or ["Linear"],
                **wanted.scheme(self.activations),
            }
        kept = _kept_layers(plans)
        packed = any(each.storage and each.storage.codec is PACKED_INT8 for each in plans)
        if packed:
            scheme = PACKED_INT8.scheme(self.activations)
            groups[f"group_{len(groups)}"] = {"targets": [_ANY_EXPERT], **scheme}
        elif formats[0].quant_type == INT8 and any(_EXPERT.search(f"{name}.") for name in kept):
            # transformers looks for packed experts where the experts' group is an integer one, and
            # would leave those stored as they were without values.
            scheme = FP8_ROW.scheme(self.activations)
            groups[f"group_{len(groups)}"] = {"targets": [_ANY_EXPERT], **scheme}
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


def _formats(plans: list[TensorPlan]) -> list[Codec]:
    """The quantizing formats in use, the commonest first."""
    counts: dict[Codec, int] = {}
    for each in plans:
        if each.format and each.format.quantizes:
            counts[each.format] = counts.get(each.format, 0) + 1
    return sorted(counts, key=lambda wanted: (-counts[wanted], str(wanted.granularity), wanted.name))
