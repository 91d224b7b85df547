"""Reading an INT8 checkpoint into a model that was built without weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from qwodel.checkpoint.formats.packed import unpack_int8
from qwodel.exceptions import ConversionError, ValidationError
from qwodel.modeling.empty_models import tie_weights
from qwodel.modeling.lazy_model import LazyModel
from qwodel.modeling.observe.layers import is_fused_experts
from qwodel.modules.int8_experts import Int8Experts
from qwodel.modules.int8_linear import Activations, Int8Linear
from qwodel.safetensors_files import checkpoint_files, read_header
from qwodel.smoothquant.stacked_experts import EXPERT_WEIGHTS
from qwodel.untrusted import checked_int, foreign_errors

__all__ = [
    "OWN_FORMAT",
    "Described",
    "TensorReader",
    "checkpoint_dtype",
    "load_int8",
    "quantization_config",
    "replace_module",
    "tensor_files",
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
        """Read it.

        Raises:
            ValidationError: the model is not quantized to INT8 W8A8, or the description is damaged.
        """
        with foreign_errors(f"{folder}: its quantization_config is damaged"):
            return cls._of(config, folder)

    @classmethod
    def _of(cls, config: Mapping[str, Any], folder: Path) -> Described:
        found = config.get("quantization_config") or {}
        method = found.get("quant_method")
        if found.get("format") == OWN_FORMAT:
            layers = found.get("layers", {})
            for each in layers.values():
                checked_int(each.get("rotation", 0), f"{folder}: a layer's rotation", high=1 << 31)
                if each.get("activations", "token") not in ("token", "tensor", "static"):
                    raise ValidationError(f"{folder}: a layer's activations are {each['activations']!r:.100}")
            return cls("token", layers)
        if method != "compressed-tensors":
            raise ValidationError(
                f"{folder} is not quantized to INT8 W8A8 ({method or 'it has full-precision weights'})",
                hint="make it with the smoothquant backend, or with Int8ForCausalLM.from_float",
            )
        groups = [each for each in found.get("config_groups", {}).values() if _is_int8(each.get("weights"))]
        # Experts may be described as weights only, since readers other than this one stack them.
        groups = [each for each in groups if not _for_experts(each)] or groups
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
        """How a layer's inputs are rounded, and the size of the rotation they get first (0: none)."""
        if self._layers is None:
            return self._activations, 0
        found = self._layers.get(name, {})
        return found.get("activations", "token"), int(found.get("rotation", 0))


def _is_int8(weights: Mapping[str, Any] | None) -> bool:
    return (
        bool(weights) and (weights or {}).get("num_bits") == 8 and (weights or {}).get("type", "int") == "int"
    )


def _for_experts(group: Mapping[str, Any]) -> bool:
    return all(target.startswith("re:") and "experts" in target for target in group.get("targets", [""]))


class TensorReader:
    """Reads tensors by name from the files of a directory."""

    def __init__(self, stored: Mapping[str, Path]) -> None:
        self._stored, self._open = stored, dict[Path, Any]()
        packed = {name.removesuffix("_packed") for name in stored if name.endswith(".weight_packed")}
        aside = {f"{name}{end}" for name in packed for end in ("_packed", "_shape")}
        self.names = frozenset(stored.keys() - aside | packed)
        """Names of tensors; packed INT8 codes have that of their weight."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()

    def __call__(self, name: str) -> torch.Tensor:
        """A tensor; codes that lie four to an int32 as int8.

        Raises:
            ValidationError: they have fewer than 8 bits.
        """
        if name in self._stored:
            return self._stored_tensor(name)
        codes = unpack_int8(self._stored_tensor(f"{name}_packed"))
        shape = self._stored_tensor(f"{name}_shape").tolist() if f"{name}_shape" in self._stored else []
        if shape != list(codes.shape):
            raise ValidationError(
                f"{name} is packed, and not from INT8 codes", hint="load it with transformers"
            )
        return codes

    def _stored_tensor(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        path = self._stored[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        tensor: torch.Tensor = self._open[path].get_tensor(name)
        return tensor


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name → file of every tensor in a model directory."""
    return {name: file for file in checkpoint_files(folder) for name in read_header(file).tensors}


def checkpoint_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype ``config.json`` names; fp32 where it names none that torch knows."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else torch.float32


def load_int8(lazy: LazyModel, read: TensorReader, described: Described) -> None:
    """Put INT8 layers and experts where the checkpoint has codes, and load everything else."""
    model = lazy.model
    count = 0
    for name, layer in list(model.named_modules()):
        made = _experts_of(lazy, name, layer, read) or _linear_of(lazy, name, layer, read, described)
        if made is None:
            lazy.load_own(layer, name)
            continue
        replace_module(model, name, made.to(lazy.device))
        count += 1
    if not count:
        raise ValidationError("the checkpoint holds no INT8 layers", hint="was it quantized to INT8 W8A8?")
    tie_weights(model)
    if missing := [name for name, each in model.named_parameters() if each.device.type == "meta"]:
        raise ConversionError(
            f"the checkpoint has no {missing[0]} (and {len(missing) - 1} more)",
            hint="does config.json belong to these weights?",
        )


def _linear_of(
    lazy: LazyModel, name: str, layer: nn.Module, read: TensorReader, described: Described
) -> Int8Linear | None:
    parts = lazy.parts(f"{name}.weight") if isinstance(getattr(layer, "weight", None), nn.Parameter) else ()
    key = parts[0].key if parts and parts[0].pattern is None else ""
    if not key or f"{key}_scale" not in read.names:
        return None
    bias = lazy.parts(f"{name}.bias")
    stem = key.removesuffix(".weight")
    activations, rotation = described.of_layer(stem)
    scale = f"{stem}.input_scale"
    if scale in read.names:
        activations = "static"
    return _layer_of(
        read(key), read(f"{key}_scale"), read(bias[0].key) if bias else None,
        read(scale) if scale in read.names else None, activations, rotation, lazy.dtype, key,
    )  # fmt: skip


def _experts_of(lazy: LazyModel, name: str, layer: nn.Module, read: TensorReader) -> Int8Experts | None:
    """Stacked experts from codes that are stacked already, or lie expert by expert."""
    if not is_fused_experts(layer):
        return None
    codes = {}
    for weight in EXPERT_WEIGHTS:
        parameter = f"{name}.{weight}"
        keys = [part.key for part in lazy.parts(parameter)]
        if not keys or any(f"{key}_scale" not in read.names for key in keys):
            return None
        values = lazy.assemble(parameter, {key: _int8(read(key), key) for key in keys})
        scales = lazy.assemble(parameter, {key: read(f"{key}_scale").float() for key in keys})
        if scales.shape != (*values.shape[:2], 1):
            raise ValidationError(f"{keys[0]} has scales of {list(scales.shape)}: experts take a scale a row")
        codes[weight] = values, scales
    return Int8Experts(layer, codes)


def _int8(codes: torch.Tensor, key: str) -> torch.Tensor:
    if codes.dtype != torch.int8:
        raise ValidationError(f"{key} is {codes.dtype}, not int8: this is no INT8 W8A8 checkpoint")
    return codes


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
    rows, columns = _int8(codes, key).shape
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
    """Put ``layer`` in the place of the submodule called ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
