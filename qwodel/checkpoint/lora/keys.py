"""Reading the key schemes of LoRA files: which two tensors form one layer's update, and its α.

Schemes: kohya (``lora_unet_x_y.lora_down.weight``), PEFT
(``base_model.model.x.y.lora_A.weight``), diffusers (``unet.x.y.lora.down.weight``,
``…processor.to_q_lora.down.weight``) and cloneofsimo (``unet:3:down``, numbered in
module order).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.exceptions import ValidationError
from qwodel.name_patterns import name_pattern
from qwodel.untrusted import checked_number, checked_path, kind_of, read_json_object

__all__ = ["LoraFile", "LoraLayer", "open_lora"]

_PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A", ".lora_B"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (":down", ":up"),
)
_FOREIGN = re.compile(
    r"\.(?:hada_w\d_[ab]|lokr_w\d(?:_[ab])?|lora_mid\.weight|dora_scale|oft_blocks|diff(?:_b)?|"
    r"lora_magnitude_vector.*|lora_embedding_[AB].*)$"
)
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)$")


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One layer's update, ΔW = α/rank · up·down.

    Attributes:
        name: the layer as the file names it, without the LoRA suffix.
        down, up: the file's keys of ``[rank, in, …]`` and ``[out, rank, …]``.
        down_shape, up_shape: their shapes.
        alpha: numerator of the update's factor; the rank when the file says nothing.
    """

    name: str
    down: str
    up: str
    down_shape: tuple[int, ...]
    up_shape: tuple[int, ...]
    alpha: float

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.down_shape[0]


@dataclass(frozen=True, slots=True)
class LoraFile:
    """All layers of one file.

    Attributes:
        path: the safetensors file.
        layers: in file order.
        transposed: the updates are for weights stored ``[in, out]`` (PEFT's ``fan_in_fan_out``).
        numbered: layers are numbered, not named (cloneofsimo).
        other: keys that belong to no layer, such as textual-inversion embeddings.
    """

    path: Path
    layers: tuple[LoraLayer, ...]
    transposed: bool
    numbered: bool
    other: tuple[str, ...]


def open_lora(path: Path) -> LoraFile:
    """Read the layers of a LoRA file or of a PEFT adapter directory, without the matrices.

    Raises:
        ValidationError: no LoRA layers in it, a layer without its other half, or a
            method that is not plain LoRA (LoHa, LoKr, DoRA, OFT, Tucker).
    """
    path = checked_path(path)
    file = path / "adapter_model.safetensors" if kind_of(path) == "directory" else path
    adapter = _adapter_config(file)
    with UnifiedSafetensorsLoader(file, low_memory=True) as reader:
        _refuse_foreign(file, reader, adapter)
        metadata = reader.metadata()
        layers, seen = [], set[str]()
        for key in reader:
            for down, up in _PAIRS:
                if key.endswith(down):
                    name = key.removesuffix(down)
                    partner = name + up
                    if partner not in reader:
                        raise ValidationError(f"{file}: {key!r} has no partner {partner!r}")
                    shapes = reader.get_shape(key), reader.get_shape(partner)
                    if min(map(len, shapes)) < 2 or 0 in shapes[0] + shapes[1]:
                        raise ValidationError(
                            f"{file}: {key!r} and its partner are {list(shapes[0])} and {list(shapes[1])}, "
                            "and a layer's two halves are matrices"
                        )
                    alpha = _alpha(reader, metadata, adapter, name, shapes[0][0])
                    layers.append(LoraLayer(_plain_name(name), key, partner, *shapes, alpha))
                    seen |= {key, partner, f"{name}.alpha"}
                    break
        other = tuple(key for key in reader if key not in seen)
    _check(file, layers, other)
    numbered = any(layer.down.endswith(":down") for layer in layers)
    return LoraFile(file, tuple(layers), bool(adapter.get("fan_in_fan_out")), numbered, other)


def _plain_name(name: str) -> str:
    """``…attn1.processor.to_q`` is the layer ``…attn1.to_q``; ``to_out`` there means ``to_out.0``."""
    found = _PROCESSOR.search(name)
    if not found:
        return name
    part = "to_out.0" if found[1] == "to_out" else found[1]
    return f"{name[: found.start()]}.{part}"


def _adapter_config(file: Path) -> Mapping[str, Any]:
    config = file.with_name("adapter_config.json")
    if file.name != "adapter_model.safetensors" or kind_of(config) != "file":
        return {}
    document = read_json_object(config)
    if not isinstance(document.get("alpha_pattern") or {}, dict):
        raise ValidationError(f"{config}: alpha_pattern is not an object")
    return document


def _alpha(
    reader: UnifiedSafetensorsLoader,
    metadata: Mapping[str, str],
    adapter: Mapping[str, Any],
    name: str,
    rank: int,
) -> float:
    """α from the layer's own tensor, else its header entry, else the adapter's configuration, else the rank."""
    if f"{name}.alpha" in reader:
        if reader.entry(f"{name}.alpha").numel != 1:
            raise ValidationError(
                f"LoRA: {name}.alpha has {reader.entry(f'{name}.alpha').numel} numbers, not one"
            )
        value = reader.get_tensor(f"{name}.alpha").float().item()
        return checked_number(value, f"LoRA: {name}.alpha")
    for key in (f"{name}.alpha", f"{name}_alpha"):
        if key in metadata:
            return _number(key, metadata[key])
    plain = name.removeprefix("base_model.model.")
    for pattern, value in (adapter.get("alpha_pattern") or {}).items():
        if name_pattern(rf"(?:^|\.)(?:{pattern})$", "alpha_pattern").search(plain):
            return _number("alpha_pattern", value)
    if adapter.get("lora_alpha") is not None:
        alpha = _number("lora_alpha", adapter["lora_alpha"])
        # rsLoRA scales by α/√r.
        return alpha * rank**0.5 if adapter.get("use_rslora") else alpha
    if "ss_network_alpha" in metadata and metadata["ss_network_alpha"] != "None":
        return _number("ss_network_alpha", metadata["ss_network_alpha"])
    return float(rank)


def _number(what: str, value: object) -> float:
    # The header's metadata holds text only.
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        raise ValidationError(f"LoRA: {what} is {value!r:.100}, not a number") from None
    return checked_number(number, f"LoRA: {what}")


def _refuse_foreign(file: Path, reader: UnifiedSafetensorsLoader, adapter: Mapping[str, Any]) -> None:
    found = next((key for key in reader if _FOREIGN.search(key)), None)
    if found or adapter.get("use_dora"):
        raise ValidationError(
            f"{file} is not plain LoRA: {found or 'use_dora in adapter_config.json'}",
            hint="merge it with the library that made it, and quantize the merged model",
        )


def _check(file: Path, layers: list[LoraLayer], other: tuple[str, ...]) -> None:
    if not layers:
        raise ValidationError(f"{file} has no LoRA layers", hint=f"its keys look like {', '.join(other[:3])}")
    names = Counter(layer.name for layer in layers)
    for layer in layers:
        if names[layer.name] > 1:
            raise ValidationError(f"{file} has {names[layer.name]} updates for the layer {layer.name!r}")
        if layer.up_shape[1] != layer.down_shape[0]:
            raise ValidationError(
                f"{file}: ranks of {layer.name!r} disagree: {list(layer.down_shape)} and {list(layer.up_shape)}"
            )
    halves = [key for key in other if any(key.endswith(up) for _, up in _PAIRS)]
    if halves:
        raise ValidationError(f"{file}: {halves[0]!r} has no down-projection")
