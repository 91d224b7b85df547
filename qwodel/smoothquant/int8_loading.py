"""Reading an INT8 checkpoint into a model that was built without weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from qwodel.exceptions import ConversionError, ValidationError
from qwodel.modeling.lazy_model import LazyModel
from qwodel.modules.int8_linear import Activations, Int8Linear
from qwodel.safetensors_files import checkpoint_files, read_header

__all__ = [
    "OWN_FORMAT",
    "Described",
    "TensorReader",
    "checkpoint_dtype",
    "load_int8",
    "quantization_config",
    "replace_module",
    "stored_tensors",
]

OWN_FORMAT = "qwodel-int8"
"""The compressed-tensors ``format`` of a directory that only qwodel reads.

transformers loads an unknown ``quant_method`` with a warning, and would take codes for weights; an
unknown format of a known method is an error there and in vLLM.
"""


def quantization_config(layers: Mapping[str, tuple[Activations, int]]) -> dict[str, Any]:
    """What ``config.json`` says of INT8 layers (name → activations, rotation) that only qwodel reads."""
    return {
        "quant_method": "compressed-tensors",
        "format": OWN_FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": OWN_FORMAT,
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            }
        },
        "layers": {
            name: {"activations": activations, "rotation": rotation}
            for name, (activations, rotation) in layers.items()
        },
    }


class Described:
    """What a configuration says of INT8 layers."""

    def __init__(self, activations: Activations, layers: Mapping[str, Mapping[str, Any]] | None) -> None:
        self._activations, self._layers = activations, layers

    @classmethod
    def of(cls, config: Mapping[str, Any], folder: Path) -> Described:
        found = config.get("quantization_config") or {}
        method = found.get("quant_method")
        if found.get("format") == OWN_FORMAT:
            return cls("token", found.get("layers", {}))
        if method != "compressed-tensors":
            raise ValidationError(
                f"{folder} is not quantized to INT8 W8A8 ({method or 'it has full-precision weights'})",
                hint="make it with the smoothquant backend, or with Int8ForCausalLM.from_float",
            )
        groups = [each for each in found.get("config_groups", {}).values() if _is_int8(each.get("weights"))]
        if not groups:
            raise ValidationError(
                f"{folder} is not quantized to INT8 W8A8: its format is {found.get('format')}",
                hint="load it with transformers",
            )
        inputs = [each.get("input_activations") for each in groups]
        weights = [each["weights"] for each in groups]
        if any(each is not None and not each.get("symmetric", True) for each in (*inputs, *weights)):
            raise ValidationError(
                f"{folder} has asymmetric codes, which an integer product does not take as they are"
            )
        if any(each is None for each in inputs):
            raise ValidationError(
                f"{folder} quantizes weights only; INT8 arithmetic needs inputs quantized too",
                hint="load it with transformers",
            )
        tensor = any(each["strategy"] == "tensor" for each in inputs)
        return cls("tensor" if tensor else "token", None)

    def of_layer(self, name: str) -> tuple[Activations, int]:
        if self._layers is None:
            return self._activations, 0
        found = self._layers.get(name, {})
        return found.get("activations", "token"), int(found.get("rotation", 0))


def _is_int8(weights: Mapping[str, Any] | None) -> bool:
    return (
        bool(weights) and (weights or {}).get("num_bits") == 8 and (weights or {}).get("type", "int") == "int"
    )


class TensorReader:
    """Reads tensors by name from the files of a directory."""

    def __init__(self, stored: Mapping[str, Path]) -> None:
        self._stored, self._open = stored, dict[Path, Any]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()

    def __call__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        path = self._stored[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        tensor: torch.Tensor = self._open[path].get_tensor(name)
        return tensor


def stored_tensors(folder: Path) -> dict[str, Path]:
    return {name: file for file in checkpoint_files(folder) for name in read_header(file).tensors}


def checkpoint_dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else torch.float32


def load_int8(lazy: LazyModel, read: TensorReader, stored: set[str], described: Described) -> None:
    """Put INT8 layers where the checkpoint has codes, and load everything else."""
    model = lazy.model
    device, dtype = lazy.device, lazy.dtype
    count = 0
    for name, layer in list(model.named_modules()):
        parts = (
            lazy.parts(f"{name}.weight") if isinstance(getattr(layer, "weight", None), nn.Parameter) else ()
        )
        key = parts[0].key if parts and parts[0].pattern is None else ""
        if not key or f"{key}_scale" not in stored:
            lazy.load_own(layer, name)
            continue
        bias = lazy.parts(f"{name}.bias")
        stem = key.removesuffix(".weight")
        activations, rotation = described.of_layer(stem)
        scale = f"{stem}.input_scale"
        if scale in stored:
            activations = "static"
        made = _layer_of(
            read(key), read(f"{key}_scale"), read(bias[0].key) if bias else None, read(scale) if scale in stored else None,
            activations, rotation, dtype, key,
        )  # fmt: skip
        replace_module(model, name, made.to(device))
        count += 1
    if not count:
        raise ValidationError("the checkpoint holds no INT8 layers", hint="was it quantized to INT8 W8A8?")
    model.tie_weights()
    if missing := [name for name, each in model.named_parameters() if each.device.type == "meta"]:
        raise ConversionError(
            f"the checkpoint has no {missing[0]} (and {len(missing) - 1} more)",
            hint="does config.json belong to these weights?",
        )


def _layer_of(
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    activations: Activations,
    rotation: int,
    dtype: torch.dtype,
    key: str,
) -> Int8Linear:
    if codes.dtype != torch.int8:
        raise ValidationError(f"{key} is {codes.dtype}, not int8: this is no INT8 W8A8 checkpoint")
    rows, columns = codes.shape
    if scale.numel() not in (1, rows):
        raise ValidationError(
            f"{key} has scales of {list(scale.shape)}: an integer product takes rows or the tensor"
        )
    layer = Int8Linear(
        columns,
        rows,
        bias=bias is not None,
        activations=activations,
        rotation=rotation,
        dtype=dtype,
        device="meta",
    )
    layer.weight = codes.contiguous()
    layer.weight_scale = scale.float().reshape(-1, 1).expand(rows, 1).contiguous()
    layer.bias = None if bias is None else bias.to(dtype)
    if activations == "static":
        if input_scale is None:
            raise ValidationError(f"scales not found for layer {key.removesuffix('.weight')}")
        layer.input_scale = input_scale.float().reshape(1)
    return layer


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
