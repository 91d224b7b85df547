"""What a checkpoint says of its own quantization, and what formats recognise their weights by.

It says so in ``config.json``, in ComfyUI's descriptions of layers, and by names, dtypes and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.formats.codec import RowDecoder
from qwodel.exceptions import ValidationError
from qwodel.model_config import check_config
from qwodel.untrusted import checked_int, parse_json

__all__ = ["FP8_DTYPES", "Recognised", "StatedQuantization", "StoredTensors"]

FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_BLOCK_SIZES = (128, 64, 32, 16, 256)

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


@dataclass(frozen=True, slots=True)
class Recognised:
    """A weight that a format found among stored tensors.

    Attributes:
        name: the name it has when it is not quantized.
        shape: the shape of its numbers.
        stored: the tensors it is read from; the codes first.
        decoder: what reads it.
        encoding: what the codes are, in a word or two, for plans.
        dtype: safetensors dtype to keep its numbers in; ``None`` for the model's own.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[str, ...]
    decoder: RowDecoder
    encoding: str
    dtype: str | None = None


class StoredTensors:
    """The tensors of a checkpoint and what is said of them, as formats look at them.

    Args:
        reader: an open checkpoint.
        config: its ``config.json``; empty where there is none.
    """

    def __init__(self, reader: UnifiedSafetensorsLoader, config: Mapping[str, Any]) -> None:
        self.reader = reader
        self.stated = StatedQuantization.of(reader, config)

    def description(self, name: str) -> Mapping[str, Any]:
        """ComfyUI's description of the layer whose weight this is; empty where it has none."""
        return self.stated.comfyui.get(name.removesuffix(".weight"), {}) if name.endswith(".weight") else {}

    def refusal(self, what: str) -> ValidationError:
        """The error that says in which form the checkpoint is quantized, and that it cannot be decoded."""
        return ValidationError(
            f"{self.reader.path} is already quantized in a form that cannot be decoded: {what}",
            hint="quantize the original, unquantized checkpoint",
        )

    def scale_of(self, name: str) -> str | None:
        """The tensor that holds the scales of ``name``, by any of its names; ``None`` where there is none.

        Raises:
            ValidationError: there are several.
        """
        stem = name.removesuffix(".weight")
        candidates = [f"{name}_scale", f"{name}_scale_inv"]
        if stem != name:
            candidates.append(f"{stem}.scale_weight")
        present = [each for each in candidates if each in self.reader]
        if len(present) > 1:
            raise self.refusal(f"two scales for {name!r}: {', '.join(present)}")
        return present[0] if present else None

    def block(self, name: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
        """Codes per scale along each dimension.

        Raises:
            ValidationError: the shapes leave a doubt.
        """
        if all(n == 1 for n in scales):
            return tuple(max(n, 1) for n in shape)
        if len(scales) == 1 and len(shape) == 2 and scales[0] == shape[0]:
            return (1, shape[1])
        if len(scales) != len(shape):
            raise self.refusal(f"{name!r} {list(shape)} with scales {list(scales)}")
        given = self.stated.block(name)
        if len(given) == 2 and len(shape) >= 2:
            wanted = tuple(-(-n // size) for n, size in zip(shape[-2:], given, strict=True))
            if tuple(scales[-2:]) == wanted and tuple(scales[:-2]) == tuple(shape[:-2]):
                return (*(1 for _ in shape[:-2]), *(int(size) for size in given))
        return tuple(_block_size(name, n, count) for n, count in zip(shape, scales, strict=True))


def _block_size(name: str, length: int, count: int) -> int:
    if count in (1, length):
        return length // count if count else 1
    sizes = [size for size in _BLOCK_SIZES if -(-length // size) == count]
    if len(sizes) != 1:
        raise ValidationError(
            f"{name!r}: {count} scales for {length} weights fit "
            f"{'several block sizes' if sizes else 'no known block size'}",
            hint="keep the model's config.json with its quantization_config beside the weights",
        )
    return sizes[0]


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
