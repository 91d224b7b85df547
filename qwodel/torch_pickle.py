"""Tensor names, shapes and dtypes of a PyTorch checkpoint, without torch and without trusting its pickle.

``torch.save`` writes a zip with one ``data.pkl`` (or, before 1.6, a plain run of
pickles). The unpickler here builds descriptions instead of tensors and knows
nothing but the handful of names a state dict needs: any other global in the
stream is refused, so nothing in the file can run.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwodel.exceptions import IntegrityError, ValidationError

__all__ = ["PickledTensor", "read_pickled_tensors"]

_DTYPE_OF_STORAGE = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
_DTYPE_OF_NAME = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as the pickle describes it; ``storage`` is equal for tensors that share memory."""

    dtype: str
    shape: tuple[int, ...]
    storage: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Dtype:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str


def read_pickled_tensors(path: str | os.PathLike[str]) -> dict[str, PickledTensor]:
    """Describe the tensors of the ``.bin``, ``.pt`` or ``.pth`` file at ``path``.

    Nested dictionaries are flattened with dots; values that are not tensors are left out.

    Raises:
        ValidationError: the file is missing, is not a torch checkpoint, or its
            pickle asks for anything but tensors (a whole pickled module, say).
        IntegrityError: the archive is damaged.
    """
    path = Path(path)
    try:
        content = _load(path)
    except FileNotFoundError as error:
        raise ValidationError(f"{path} does not exist") from error
    except OSError as error:
        raise ValidationError(f"{path} cannot be read: {error.strerror}") from error
    except (zipfile.BadZipFile, EOFError, struct.error, IndexError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path} is a damaged torch checkpoint ({error})", hint="download or save the file again"
        ) from error
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise IntegrityError(
                f"{path} is a truncated torch checkpoint", hint="download or save the file again"
            ) from error
        raise ValidationError(
            f"{path} cannot be read safely: {error}",
            hint="only checkpoints of plain tensors are opened; save the state dict as safetensors",
        ) from error
    return dict(_flatten(content, ""))


def _load(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if not names:
                raise pickle.UnpicklingError(
                    "the archive holds no data.pkl (a TorchScript or exported program?)"
                )
            return _HeaderUnpickler(io.BytesIO(archive.read(names[0]))).load()
    with path.open("rb") as file:
        if file.read(2)[:1] != b"\x80":
            raise pickle.UnpicklingError("it is neither a zip archive nor a pickle")
        file.seek(0)
        if _HeaderUnpickler(file).load() != _LEGACY_MAGIC:
            raise pickle.UnpicklingError("it is a pickle, but not one torch.save wrote")
        _HeaderUnpickler(file).load()  # protocol version
        _HeaderUnpickler(file).load()  # sizes of the writer's C types
        return _HeaderUnpickler(file).load()


def _rebuild_tensor(storage: _Storage, _offset: int, shape: tuple[int, ...], *_: Any) -> PickledTensor:
    return PickledTensor(storage.dtype, tuple(shape), storage.key)


def _rebuild_parameter(tensor: PickledTensor, *_: Any) -> PickledTensor:
    return tensor


class _HeaderUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return _rebuild_parameter
        if module == "torch" and name in _DTYPE_OF_NAME:
            return _Dtype(_DTYPE_OF_NAME[name])
        if module in ("torch", "torch.storage") and name in _DTYPE_OF_STORAGE:
            return _Dtype(_DTYPE_OF_STORAGE[name])
        if (module, name) == ("torch", "Size"):
            return tuple
        raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        # ("storage", type, key, location, numel)
        _, kind, key, *_ = pid
        return _Storage(kind.name, str(key))


def _flatten(value: Any, prefix: str) -> list[tuple[str, PickledTensor]]:
    if isinstance(value, PickledTensor):
        return [(prefix, value)]
    if not isinstance(value, Mapping):
        return []
    found: list[tuple[str, PickledTensor]] = []
    for key, item in value.items():
        found += _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return found
