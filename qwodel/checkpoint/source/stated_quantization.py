"""What a checkpoint says of its own quantization: in ``config.json``, and in ComfyUI's descriptions of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.exceptions import ValidationError
from qwodel.model_config import check_config
from qwodel.untrusted import checked_int, parse_json

__all__ = ["StatedQuantization"]

_MARKER_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class StatedQuantization:
    """What the codes are said to be.

    Attributes:
        config: the ``quantization_config``; empty where there is none.
        dtype: safetensors dtype of the model's computing.
        comfyui: layer → its ComfyUI description.
    """

    config: Mapping[str, Any]
    dtype: str
    comfyui: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, reader: UnifiedSafetensorsLoader, config: Mapping[str, Any]) -> Self:
        """Read it off a checkpoint and its ``config.json``.

        Raises:
            ValidationError: ComfyUI's description, or an entry of the configuration, is damaged.
        """
        check_config(config, str(reader.path))
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        stored = {"float16": "F16", "float32": "F32"}.get(dtype.removeprefix("torch."), "BF16")
        return cls(config.get("quantization_config") or {}, stored, _comfyui_formats(reader))

    @property
    def method(self) -> str | None:
        """The ``quant_method``."""
        return self.config.get("quant_method")

    @property
    def packs_int8(self) -> bool:
        """Whether packed weights have symmetric 8-bit codes; those of fewer bits may have the same shape."""
        packed = [group["weights"] for group in self._groups if group.get("format") == "pack-quantized"]
        eight = all(each.get("num_bits") == 8 and each.get("symmetric", True) for each in packed)
        return bool(packed) and eight

    def block(self, name: str) -> list[int]:
        """Rows and columns of a weight that share a scale; empty where nothing is said."""
        side = self.comfyui.get(name.removesuffix(".weight"), {}).get("group_size")
        if side:
            return [side, side]
        if self.config.get("weight_block_size"):
            return list(self.config["weight_block_size"])
        stated = [(group.get("weights") or {}).get("block_structure") for group in self._groups]
        sizes = {tuple(each) for each in stated if each}
        return list(sizes.pop()) if len(sizes) == 1 else []

    @property
    def _groups(self) -> list[Mapping[str, Any]]:
        return list((self.config.get("config_groups") or {}).values())


def _comfyui_formats(reader: UnifiedSafetensorsLoader) -> dict[str, Mapping[str, Any]]:
    """Layer → its ComfyUI description; the header wins over the tensors, as in ComfyUI."""
    formats: dict[str, Mapping[str, Any]] = {}
    for name in reader:
        if name.endswith(".comfy_quant"):
            formats[name.removesuffix(".comfy_quant")] = _marker(reader, name)
    where = f"{reader.path}: its ComfyUI quantization description"
    header = parse_json(reader.metadata().get("_quantization_metadata", "{}"), where)
    layers = header.get("layers", {}) if isinstance(header, dict) else None
    if not isinstance(layers, dict):
        raise ValidationError(f"{where} is damaged: its layers are no object")
    formats.update({layer: _description(value, f"{where} of {layer}") for layer, value in layers.items()})
    return formats


def _marker(reader: UnifiedSafetensorsLoader, name: str) -> Mapping[str, Any]:
    where = f"{reader.path}: the ComfyUI description {name}"
    if reader.entry(name).nbytes > _MARKER_BYTES:
        raise ValidationError(f"{where} has {reader.entry(name).nbytes:,} bytes")
    return _description(parse_json(bytes(reader.read_bytes(name).numpy()), where), where)


def _description(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValidationError(f"{where} is damaged: it is no object")
    if value.get("group_size"):
        checked_int(value["group_size"], f"{where}: group_size", low=1)
    if not isinstance(value.get("format") or "", str):
        raise ValidationError(f"{where} is damaged: its format is no string")
    return value
