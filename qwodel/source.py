"""What was given: a local checkpoint, described from its headers alone.

:func:`inspect_source` accepts a Hugging Face directory (safetensors or ``.bin``), that of a diffusers
pipeline (its denoiser is what is described), a single ``.safetensors``, ``.gguf``, ``.pt``, ``.pth`` or
``.pt2`` file, and answers in milliseconds: only headers, indexes and ``config.json`` are read. Hub ids
are :mod:`qwodel.hub`'s, which downloads them to a directory first.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from qwodel.exceptions import ValidationError
from qwodel.gguf_header import read_gguf_header
from qwodel.model_config import read_config
from qwodel.parsed_files import ParsedFiles
from qwodel.safetensors_files import check_index, find_index, read_index
from qwodel.torch_pickle import read_pickled_tensors
from qwodel.untrusted import checked_path, kind_of
from qwodel.weight_search import denoiser_folder, find_weights

__all__ = ["INPUT_FORMATS", "ModelSource", "TensorInfo", "inspect_source", "read_config"]

INPUT_FORMATS: Mapping[str, str] = {
    "huggingface": "a Hugging Face model directory",
    "diffusers": "a directory of a diffusers pipeline",
    "safetensors": "a single .safetensors file",
    "gguf": "a .gguf file",
    "pytorch": "a .pt, .pth or .bin file",
    "torchscript": "a TorchScript file",
    "exported": "a program saved by torch.export",
}
"""Kinds of input, as :attr:`ModelSource.input_format` names them."""

_PROGRAMS = frozenset({"torchscript", "exported"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's dtype (safetensors or ggml name) and row-major shape."""

    dtype: str
    shape: tuple[int, ...]
    numel: int


@dataclass(frozen=True)
class ModelSource:
    """A local model, as its headers describe it.

    ``parameters`` counts elements once where tensors share storage (0 for a traced program); ``dtypes``
    maps dtype to number of elements; ``weight_bytes`` is the size of the weight
    files; ``tied_embeddings`` is ``None`` where neither config nor tensors tell; ``parsed`` is for those
    who look at the same files next.
    """

    given: str
    path: Path
    input_format: str
    name: str
    weight_files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    architecture: str | None
    parameters: int
    dtypes: Mapping[str, int]
    weight_bytes: int
    tied_embeddings: bool | None
    revision: str | None = None
    parsed: ParsedFiles = field(default_factory=ParsedFiles, repr=False, compare=False)

    def describe(self) -> dict[str, Any]:
        """Return the facts above as a JSON-ready dictionary."""
        return {
            "model": self.given,
            "name": self.name,
            "path": str(self.path),
            "input_format": self.input_format,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "tensors": len(self.tensors),
            "dtypes": dict(self.dtypes),
            "weight_bytes": self.weight_bytes,
            "weight_files": [file.name for file in self.weight_files],
            "tied_embeddings": self.tied_embeddings,
            "revision": self.revision,
        }


def inspect_source(
    path: str | os.PathLike[str],
    *,
    given: str | None = None,
    name: str | None = None,
    revision: str | None = None,
) -> ModelSource:
    """Describe the model at ``path`` from its headers.

    Args:
        path: a model directory or file.
        given: what the user wrote, where that differs from ``path``.
        name: the model's name, where the path does not tell it (a hub cache).
        revision: the hub commit the files are from.

    Raises:
        ValidationError: nothing is there, or nothing that holds weights.
        IntegrityError: a weight file is truncated or damaged.
    """
    path = checked_path(path, "model path")
    if kind_of(path) is None:
        raise ValidationError(
            f"{path} does not exist", hint="give a model directory, a model file or a hub id (owner/name)"
        )
    denoiser = denoiser_folder(path)
    kind, files = find_weights(denoiser or path)
    if denoiser is not None:
        kind = "diffusers"
    parsed = ParsedFiles()
    config = parsed.config(denoiser or path) if path.is_dir() else {}
    if kind in _PROGRAMS:
        content = _describe_program()
    else:
        content = (
            _describe_gguf(files)
            if kind == "gguf"
            else _describe_tensors(denoiser or path, files, config, parsed)
        )
    resolved = path.resolve()
    return ModelSource(
        given=given or str(path),
        path=path,
        input_format=kind,
        name=name or (resolved.name if path.is_dir() else resolved.stem),
        weight_files=tuple(files),
        config=config,
        weight_bytes=sum(file.stat().st_size for file in files),
        revision=revision,
        parsed=parsed,
        **content,
    )


class _Content(TypedDict):
    """What headers say: fields of :class:`ModelSource`."""

    tensors: dict[str, TensorInfo]
    architecture: str | None
    parameters: int
    dtypes: dict[str, int]
    tied_embeddings: bool | None


def _describe_tensors(
    folder: Path, files: list[Path], config: Mapping[str, Any], parsed: ParsedFiles
) -> _Content:
    tensors: dict[str, TensorInfo] = {}
    held: dict[str, Path] = {}
    shared: set[tuple[str, str]] = set()
    parameters = 0
    dtypes: Counter[str] = Counter()
    for file in files:
        for name, dtype, shape, numel, storage in _entries(file, parsed):
            if name in tensors:
                raise ValidationError(
                    f"tensor {name!r} is in more than one of the weight files (again in {file.name})"
                )
            tensors[name], held[name] = TensorInfo(dtype, shape, numel), file
            if storage is not None and (file.name, storage) in shared:
                continue
            if storage is not None:
                shared.add((file.name, storage))
            parameters += numel
            dtypes[dtype] += numel
    _check_index(folder, files, held)
    architectures = config.get("architectures") or [config.get("_class_name")]
    return {
        "tensors": tensors,
        "architecture": architectures[0],
        "parameters": parameters,
        "dtypes": dict(dtypes.most_common()),
        "tied_embeddings": _tied(tensors, config),
    }


def _check_index(folder: Path, files: list[Path], held: Mapping[str, Path]) -> None:
    index = find_index(folder, files[0].suffix) if folder.is_dir() else None
    if index is not None:
        placed = {name: file.relative_to(folder).as_posix() for name, file in held.items()}
        check_index(index, read_index(index), placed)


def _entries(file: Path, parsed: ParsedFiles) -> Iterable[tuple[str, str, tuple[int, ...], int, str | None]]:
    if file.suffix == ".safetensors":
        for entry in parsed.header(file):
            yield entry.name, entry.dtype, entry.shape, entry.numel, None
    else:
        for name, tensor in read_pickled_tensors(file).items():
            yield name, tensor.dtype, tensor.shape, tensor.numel, tensor.storage


def _describe_program() -> _Content:
    # Its weights are known once torch has loaded it.
    return {"tensors": {}, "architecture": None, "parameters": 0, "dtypes": {}, "tied_embeddings": None}


def _describe_gguf(files: list[Path]) -> _Content:
    headers = [read_gguf_header(file) for file in files]
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    if len(tensors) != sum(len(header.tensors) for header in headers):
        raise ValidationError(f"a tensor is in more than one part of {files[0]}")
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[tensor.type] += tensor.numel
    return {
        "tensors": {t.name: TensorInfo(t.type, t.shape, t.numel) for t in tensors.values()},
        "architecture": headers[0].architecture,
        "parameters": sum(dtypes.values()),
        "dtypes": dict(dtypes.most_common()),
        "tied_embeddings": "output.weight" not in tensors if "token_embd.weight" in tensors else None,
    }


def _tied(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> bool | None:
    if any(name.endswith("lm_head.weight") for name in tensors):
        # The file decides: a saved head may be a copy, and then the config's flag says so.
        return bool(config.get("tie_word_embeddings", False))
    nested = config.get("text_config")
    for scope in (config, nested if isinstance(nested, dict) else {}):
        if "tie_word_embeddings" in scope:
            return bool(scope["tie_word_embeddings"])
    # transformers' own default is tied.
    return True if config and any(name.endswith("embed_tokens.weight") for name in tensors) else None
