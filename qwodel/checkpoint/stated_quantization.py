"""What a checkpoint says of its own quantization: in ``config.json``, and in ComfyUI's descriptions of layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qwodel.checkpoint.reader import UnifiedSafetensorsLoader
from qwodel.exceptions import ValidationError

__all__ = ["StatedQuantization"]


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
            ValidationError: ComfyUI's description is damaged.
        """
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
            return [int(side), int(side)]
        if self.config.get("weight_block_size"):
            return [int(size) for size in self.config["weight_block_size"]]
        stated = [(group.get("weights") or {}).get("block_structure") for group in self._groups]
        sizes = {tuple(each) for each in stated if each}
        return list(sizes.pop()) if len(sizes) == 1 else []

    @property
    def _groups(self) -> list[Mapping[str, Any]]:
        return list((self.config.get("config_groups") or {}).values())


def _comfyui_formats(reader: UnifiedSafetensorsLoader) -> dict[str, Mapping[str, Any]]:
    """Layer → its ComfyUI description; the header wins over the tensors, as in ComfyUI."""
    formats: dict[str, Mapping[str, Any]] = {}
    try:
        for name in reader:
            if name.endswith(".comfy_quant"):
                text = bytes(reader.read_bytes(name).tolist()).decode()
                formats[name.removesuffix(".comfy_quant")] = dict(json.loads(text))
        header = json.loads(reader.metadata().get("_quantization_metadata", "{}"))
        formats.update({layer: dict(value) for layer, value in header.get("layers", {}).items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValidationError(
            f"{reader.path}: its ComfyUI quantization description is damaged: {error}"
        ) from error
    return formats
