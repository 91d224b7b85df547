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
from qwodel.exceptions import ValidationError
from qwodel.hub import HubModel, looks_like_hub_id
from qwodel.modeling.lazy_model import config_of, open_lazily
from qwodel.modules.int8_experts import Int8Experts
from qwodel.modules.int8_linear import Int8Linear
from qwodel.output import StagedOutput, disk_errors
from qwodel.progress import Progress
from qwodel.report import envelope
from qwodel.smoothquant.int8_loading import (
    OWN_FORMAT,
    Described,
    TensorReader,
    checkpoint_dtype,
    load_int8,
    quantization_config,
    replace_module,
    tensor_files,
)
from qwodel.smoothquant.scheme import Scheme
from qwodel.smoothquant.simulate import quantizable_layers
from qwodel.smoothquant.stacked_experts import stacked_experts
from qwodel.untrusted import checked_path, kind_of

__all__ = ["Int8ForCausalLM", "local_folder"]


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
            DependencyError: transformers is not installed.
        """
        folder = local_folder(str(model_id), revision, token)
        config = config_of(folder)
        if cls.model_types is not None and config.get("model_type") not in cls.model_types:
            raise ValidationError(
                f"unsupported model architecture {config.get('model_type')}: {cls.__name__} loads "
                f"{', '.join(cls.model_types)}",
                hint="Int8ForCausalLM loads every architecture",
            )
        stored = tensor_files(folder)
        described = Described.of(config, folder)
        with TensorReader(stored) as read:
            lazy = open_lazily(
                config, read.names, read, dtype=dtype or checkpoint_dtype(config), device=device
            )
            load_int8(lazy, read, described)
        model = lazy.model.to(device)
        if (folder / "generation_config.json").is_file():
            from transformers import GenerationConfig

            model.generation_config = GenerationConfig.from_pretrained(folder)
        return cls(model.eval())

    @classmethod
    def from_float(
        cls, model: Any, scheme: Scheme | None = None, *, input_scales: Mapping[str, float] | None = None
    ) -> Self:
        """Round the linear layers and stacked experts of a model (smoothed before) to INT8.

        Args:
            model: a transformers language model; its layers are replaced, so it becomes the INT8 one.
            scheme: what shares a scale, and the rotation of inputs; experts always have a scale a row
                and a token, without rotation.
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
            replace_module(
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
        for name, experts in stacked_experts(model).items():
            replace_module(model, name, Int8Experts.from_float(experts))
        return cls(model.eval())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformers model's own forward pass, with its arguments."""
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
            output.publish(
                envelope(
                    backend="smoothquant",
                    format=OWN_FORMAT,
                    source={"name": type(self.model).__name__, "sha256": {}},
                    recipe={},
                    packages=("torch", "transformers", "safetensors"),
                    report={"layers": len(layers)},
                )
            )
        return target


def local_folder(model_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """The directory of a model; one of the hub is downloaded.

    Raises:
        ValidationError: it is not there.
    """
    folder = checked_path(model_id)
    kind = kind_of(folder)
    if kind == "directory":
        return folder
    if kind or not looks_like_hub_id(model_id):
        raise ValidationError(
            f"{model_id} is no model directory", hint="give a directory or a hub id (owner/name)"
        )
    return HubModel(model_id, revision, token).fetch(Progress(None)).path


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
