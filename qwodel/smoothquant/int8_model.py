"""A transformers language model whose linear layers are INT8, built without its full-precision weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from qwodel.algorithms.quant_types import ROW, TENSOR
from qwodel.exceptions import ConversionError, ValidationError
from qwodel.hub import HubModel, looks_like_hub_id
from qwodel.modeling.lazy_model import LazyModel, config_of, open_lazily
from qwodel.modules.int8_linear import Activations, Int8Linear
from qwodel.output import StagedOutput, disk_errors
from qwodel.progress import Progress
from qwodel.safetensors_files import checkpoint_files, read_header
from qwodel.smoothquant.scheme import Scheme
from qwodel.smoothquant.simulate import quantizable_layers

__all__ = ["OWN_FORMAT", "Int8ForCausalLM", "local_folder", "quantization_config"]

OWN_FORMAT = "qwodel-int8"
"""The compressed-tensors ``format`` of a directory that only qwodel reads.

transformers loads an unknown ``quant_method`` with a warning, and would take codes for weights; an
unknown format of a known method is an error there and in vLLM.
"""


class Int8ForCausalLM(nn.Module):
    """A causal language model with :class:`~qwodel.modules.int8_linear.Int8Linear` layers.

    ``forward`` and ``generate`` are those of the transformers model inside, ``model``. Weights of
    linear layers take a byte each, half of fp16; embeddings, norms and the head stay in ``dtype``.
    """

    model_types: ClassVar[tuple[str, ...] | None] = None
    """Model types that may be loaded; every one where ``None``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Load a W8A8 directory: ours, or any compressed-tensors one with INT8 rows or tensors.

        Tensors are read one by one into a model that was built without weights.

        Args:
            model_id: a directory or a hub id.
            dtype: of what is not INT8; the checkpoint's own where ``None``.
            device: where it goes.
            revision, token: of a hub model.

        Raises:
            ValidationError: it is not there, not quantized to INT8 W8A8, or of another model type.
            ConversionError: tensors are missing or do not fit.
            DependencyError: transformers or accelerate is not installed.
        """
        folder = local_folder(str(model_id), revision, token)
        config = config_of(folder)
        if cls.model_types is not None and config.get("model_type") not in cls.model_types:
            raise ValidationError(
                f"unsupported model architecture {config.get('model_type')}: {cls.__name__} loads "
                f"{', '.join(cls.model_types)}",
                hint="Int8ForCausalLM loads every architecture",
            )
        stored = _stored(folder)
        described = _Described.of(config, folder)
        with _Reader(stored) as read:
            lazy = open_lazily(config, stored, read, dtype=dtype or _dtype(config), device=device)
            _load(lazy, read, set(stored), described)
        model = lazy.model.to(device)
        if (folder / "generation_config.json").is_file():
            from transformers import GenerationConfig

            model.generation_config = GenerationConfig.from_pretrained(folder)
        return cls(model.eval())

    @classmethod
    def from_float(
        cls, model: Any, scheme: Scheme | None = None, *, input_scales: Mapping[str, float] | None = None
    ) -> Self:
        """Round the linear layers of a model (smoothed before) to INT8.

        Args:
            model: a transformers language model; its layers are replaced, so it becomes the INT8 one.
            scheme: what shares a scale, and the rotation of inputs.
            input_scales: layer → scale of static activations.

        Raises:
            ValidationError: NaN or Inf among the weights, or a layer without an input scale.
        """
        scheme = scheme or Scheme()
        for name, layer in quantizable_layers(model).items():
            scale = None
            if input_scales is not None:
                if name not in input_scales:
                    raise ValidationError(f"scales not found for layer {name}")
                scale = float(input_scales[name])
            _replace(
                model,
                name,
                Int8Linear.from_float(
                    layer,
                    granularity=ROW if scheme.weights == "channel" else TENSOR,
                    activations="static" if scale is not None else scheme.activations,
                    input_scale=scale,
                    rotation=scheme.rotation(_columns(layer)) or 0,
                ),
            )
        return cls(model.eval())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformers model's own forward pass: ``input_ids``, ``attention_mask``, …"""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Write text: transformers' ``generate``."""
        return self.model.generate(*args, **kwargs)

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def memory_footprint(self) -> int:
        """Bytes of all weights and buffers, shared ones once."""
        tensors = {t.data_ptr(): t for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a directory that :meth:`from_pretrained` loads, and only it.

        Raises:
            ValidationError: it exists.
            ResourceError: the disk is full.
        """
        from safetensors.torch import save_file

        target = Path(folder)
        layers = {name: each for name, each in self.model.named_modules() if isinstance(each, Int8Linear)}
        config = json.loads(self.model.config.to_json_string(use_diff=False))
        config["architectures"] = [type(self.model).__name__]
        config["quantization_config"] = quantization_config(
            {name: (each.activations, each.rotation) for name, each in layers.items()}
        )
        with StagedOutput(target, overwrite=overwrite) as output, disk_errors(f"writing {target}"):
            output.path.mkdir()
            save_file(_own_tensors(self.model), output.path / "model.safetensors", metadata={"format": "pt"})
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            (output.path / "config.json").write_text(text, "utf-8")
            if getattr(self.model, "generation_config", None) is not None:
                self.model.generation_config.save_pretrained(output.path)
            output.publish({"format": OWN_FORMAT, "layers": len(layers)})
        return target


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


class _Described:
    """What a configuration says of INT8 layers."""

    def __init__(self, activations: Activations, layers: Mapping[str, Mapping[str, Any]] | None) -> None:
        self._activations, self._layers = activations, layers

    @classmethod
    def of(cls, config: Mapping[str, Any], folder: Path) -> _Described:
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


class _Reader:
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


def local_folder(model_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """The directory of a model; one of the hub is downloaded.

    Raises:
        ValidationError: it is not there.
    """
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not looks_like_hub_id(model_id):
        raise ValidationError(
            f"{model_id} is no model directory", hint="give a directory or a hub id (owner/name)"
        )
    return HubModel(model_id, revision, token).fetch(Progress(None)).path


def _stored(folder: Path) -> dict[str, Path]:
    return {name: file for file in checkpoint_files(folder) for name in read_header(file).tensors}


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _load(lazy: LazyModel, read: _Reader, stored: set[str], described: _Described) -> None:
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
        _replace(model, name, made.to(device))
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


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _columns(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0 if type(layer).__name__ == "Conv1D" else 1]


def _own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors by name, tied ones once."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    kept = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = tensor.detach().contiguous().cpu()
    return kept
