"""Quantized modules in safetensors: tensors as they are, structure as JSON beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwodel.exceptions import DependencyError, IntegrityError, ValidationError
from qwodel.extras import install_hint
from qwodel.model_config import read_config
from qwodel.modeling.empty_models import parameters_on_meta
from qwodel.process_state import MODEL_BUILDING
from qwodel.safetensors_files import check_index, checkpoint_files, find_index, read_header, read_index
from qwodel.segquant.structure import FORMAT, QUANT_METHOD, built_layer, structure_of
from qwodel.untrusted import checked_path, foreign_errors, kind_of, parse_json, read_json_object

__all__ = ["load_quantized", "save_quantized"]

_KEY = "qwodel.segquant"
_WEIGHTS = "diffusion_pytorch_model"
_SHARD = 10_000_000_000


def save_quantized(model: nn.Module, path: str | os.PathLike[str], *, max_shard_size: int = _SHARD) -> Path:
    """Write a quantized model.

    Args:
        path: a ``.safetensors`` file, which holds the structure in its metadata; or a directory, which
            gets ``config.json`` and shards. Of a diffusers model the directory is all that
            :func:`load_quantized` needs.

    Returns:
        ``path``.

    Raises:
        ValidationError: nothing in the model is quantized.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import save_file

    path = Path(path)
    structure = structure_of(model)
    if not structure["layers"]:
        raise ValidationError("the model has no quantized layers", hint="quantize it first")
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_unshared(state), path, {_KEY: json.dumps(structure)})
        return path
    path.mkdir(parents=True, exist_ok=True)
    config = dict(getattr(model, "config", None) or {})
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    config |= {"_class_name": type(model).__name__, "quantization_config": structure}
    (path / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", "utf-8")
    save_torch_state_dict(
        _unshared(state),
        path,
        filename_pattern=_WEIGHTS + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    return path


def load_quantized(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, device: str | torch.device = "cpu"
) -> Any:
    """Read what :func:`save_quantized` or the segquant backend wrote.

    Args:
        path: a file, a model's directory, or a directory of a diffusers pipeline.
        model: a model of the same architecture, whose layers and weights are replaced; not needed for
            directories of diffusers models.

    Returns:
        the model, in evaluation mode; of a pipeline's directory the pipeline.

    Raises:
        ValidationError: the path holds no quantized model, or a model is needed.
        IntegrityError: tensors are missing, left over or of other shapes.
    """
    path = checked_path(path)
    if kind_of(path) == "directory" and kind_of(path / "model_index.json") == "file":
        return _load_pipeline(path, device)
    files, structure, config = _opened(path)
    if model is None:
        model = _empty(path, config)
    return _fill(model, files, structure, path).to(device).eval()


def _opened(path: Path) -> tuple[list[Path], dict[str, Any], dict[str, Any]]:
    config: dict[str, Any] = {}
    kind = kind_of(path)
    if kind is None:
        raise ValidationError(f"{path} does not exist")
    if kind == "directory":
        config = read_config(path)
        if not config:
            raise ValidationError(f"{path} has no readable config.json")
        structure, files = config.get("quantization_config") or {}, checkpoint_files(path)
    else:
        text = read_header(path).metadata.get(_KEY)
        structure, files = parse_json(text, f"the structure in {path}") if text else {}, [path]
    if not isinstance(structure, dict):
        raise ValidationError(f"{path}: the structure of its layers is no object")
    if structure.get("quant_method") != QUANT_METHOD:
        raise ValidationError(
            f"{path} holds no model quantized by segquant", hint="write it with save_quantized or -b segquant"
        )
    if structure.get("format") != FORMAT:
        raise ValidationError(
            f"{path} is of format {structure.get('format')}, and this release reads {FORMAT}",
            hint="update qwodel",
        )
    if not isinstance(structure.get("layers"), dict) or not structure["layers"]:
        raise ValidationError(f"{path} describes no quantized layers")
    return files, structure, config


def _fill(model: nn.Module, files: list[Path], structure: Mapping[str, Any], path: Path) -> nn.Module:
    layers = dict(model.named_modules())
    for name, described in structure["layers"].items():
        if name not in layers or not name:
            raise ValidationError(
                f"the model has no layer {name!r:.200}", hint="give the architecture that was quantized"
            )
        parent, _, leaf = name.rpartition(".")
        with foreign_errors(f"{path}: the description of the layer {name} is damaged"):
            setattr(model.get_submodule(parent), leaf, built_layer(described))
    state = _state(files, path)
    _restore_shared(model, state)
    with foreign_errors("the tensors do not fit the model", error=IntegrityError):
        model.load_state_dict(state, assign=True)
    return model


def _state(files: list[Path], path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the files, which hold what their index says."""
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    held: dict[str, str] = {}
    for file in files:
        for entry in read_header(file):
            if entry.name in held:
                raise ValidationError(f"{path}: tensor {entry.name!r} is in more than one file")
            held[entry.name] = file.name
        with foreign_errors(f"{file} cannot be read", error=IntegrityError):
            state |= load_file(file)
    index = find_index(path) if path.is_dir() else None
    if index is not None:
        check_index(index, read_index(index), held)
    return state


def _empty(path: Path, config: Mapping[str, Any]) -> nn.Module:
    name = str(config.get("_class_name") or "")
    diffusers = _diffusers()
    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_config"):
        raise ValidationError(
            f"{path} is {'a ' + name if name else 'no model of diffusers'}, which cannot be built from its configuration",
            hint="pass model=, a model of the same architecture",
        )
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with (
        foreign_errors(f"{name} cannot be built from the configuration of {path}"),
        MODEL_BUILDING,
        parameters_on_meta(),
    ):
        model: nn.Module = kind.from_config(plain)
    return model


def _load_pipeline(path: Path, device: str | torch.device) -> Any:
    quantized = {}
    for name in read_json_object(path / "model_index.json"):
        if name != Path(name).name or name in (".", ".."):
            raise ValidationError(f"{path}: model_index.json names {name!r:.200}, which is no component")
        if name.startswith("_") or kind_of(path / name) != "directory":
            continue
        stated = read_config(path / name).get("quantization_config") or {}
        if stated.get("quant_method") == QUANT_METHOD:
            quantized[name] = load_quantized(path / name, device=device)
    if not quantized:
        raise ValidationError(f"{path} has no component quantized by segquant")
    pipelines = _diffusers().DiffusionPipeline
    with foreign_errors(f"diffusers cannot load {path}"), MODEL_BUILDING:
        pipeline = pipelines.from_pretrained(path, local_files_only=True, **quantized)
    return pipeline.to(device)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise DependencyError("diffusers is not installed", hint=install_hint("segquant")) from error
    return diffusers


def _unshared(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One name for tensors that share storage: the first."""
    seen: set[tuple[int, torch.Size]] = set()
    kept = {}
    for name, tensor in state.items():
        key = tensor.data_ptr(), tensor.shape
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = tensor
    return kept


def _restore_shared(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Give tied names the tensor that was saved under their first."""
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
    for tied in names.values():
        present = next((state[name] for name in tied if name in state), None)
        if present is not None:
            state.update({name: present for name in tied if name not in state})
