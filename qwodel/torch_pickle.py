"""Tensor names, shapes and dtypes of a PyTorch checkpoint, without torch and without trusting its pickle.

``torch.save`` writes a zip with one ``data.pkl`` (or, before 1.6, a plain run of
pickles). :mod:`qwodel.plain_pickle` reads it and builds descriptions instead of
tensors, with nothing but the handful of names a state dict needs: any other global
in the stream is refused, so nothing in the file can run.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qwodel.exceptions import IntegrityError, ValidationError
from qwodel.plain_pickle import DamagedPickleError, PlainUnpickler, RefusedPickleError
from qwodel.untrusted import open_regular

__all__ = ["PickledTensor", "check_torch_file", "read_pickled_tensors"]

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
_MAX_DIMENSIONS = 64  # torch's
_MAX_DEPTH = 32
_MAX_NAME = 1024
_BROKEN_ARCHIVE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, NotImplementedError,
    OverflowError, ValueError,
)  # fmt: skip
_END = object()
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as the pickle describes it; ``storage`` is equal for tensors that share memory.

    ``offset`` counts elements into the storage; ``contiguous`` says that rows follow one another there.
    """

    dtype: str
    shape: tuple[int, ...]
    storage: str
    offset: int = 0
    contiguous: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Dtype:
    name: str

    def __call__(self) -> None:
        raise RefusedPickleError(f"its pickle makes something of {self.name}")


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    numel: int


def read_pickled_tensors(path: str | os.PathLike[str]) -> dict[str, PickledTensor]:
    """Describe the tensors of the ``.bin``, ``.pt`` or ``.pth`` file at ``path``.

    Nested dictionaries are flattened with dots; values that are not tensors are left out.

    Raises:
        ValidationError: the file is missing, is not a torch checkpoint, or its
            pickle asks for anything but tensors (a whole pickled module, say).
        IntegrityError: the archive is damaged.
    """
    path = Path(path)
    with open_regular(path) as file, _explained(str(path)):
        return _describe(file)


def check_torch_file(file: BinaryIO, where: str) -> None:
    """Walk through the pickles of a torch file, before ``torch.load`` does; stand at its beginning again.

    ``weights_only=True`` keeps code out, but a key of nested tuples ends the process, shared ones take
    for ever to hash, and compressed records fill the memory. This finds those; what types are allowed
    stays torch's to say.

    Raises:
        ValidationError: the file asks for more than its size.
        IntegrityError: it is damaged.
    """
    with _explained(where):
        if _is_archive(file):
            PlainUnpickler(_pickle_of_archive(file), _any_class, _no_storage).load()
        else:
            file.seek(0)
            unpickler = PlainUnpickler(file.read(), _any_class, _no_storage)
            if unpickler.load() == _LEGACY_MAGIC:
                for _ in range(4):  # version, system, content and storage keys
                    unpickler.load()
        file.seek(0)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except DamagedPickleError as error:
        raise IntegrityError(
            f"{where} is a truncated torch checkpoint"
            if str(error) == "truncated"
            else f"{where} is a damaged torch checkpoint ({error})",
            hint="download or save the file again",
        ) from error
    except RefusedPickleError as error:
        raise ValidationError(
            f"{where} cannot be read safely: {error}",
            hint="only checkpoints of plain tensors are opened; save the state dict as safetensors",
        ) from error
    except OSError as error:
        raise ValidationError(f"{where} cannot be read: {error.strerror or error}") from error


def _describe(file: BinaryIO) -> dict[str, PickledTensor]:
    if _is_archive(file):
        data = _pickle_of_archive(file)
        return _flatten(_unpickler(data).load(), len(data))
    file.seek(0)
    if file.read(2)[:1] != b"\x80":
        raise RefusedPickleError("it is neither a zip archive nor a pickle")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        unpickler = _unpickler(stream)
        if unpickler.load() != _LEGACY_MAGIC:
            raise RefusedPickleError("it is a pickle, but not one torch.save wrote")
        unpickler.load()  # protocol version
        unpickler.load()  # sizes of the writer's C types
        content = unpickler.load()
        return _flatten(content, unpickler.position)


def _is_archive(file: BinaryIO) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except _BROKEN_ARCHIVE as error:  # one of several disks, say
        raise DamagedPickleError(str(error)) from error


def _pickle_of_archive(file: BinaryIO) -> bytes:
    size = file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            found = [each for each in archive.infolist() if each.filename.endswith("/data.pkl")]
            if not found:
                raise RefusedPickleError("the archive holds no data.pkl (a TorchScript or exported program?)")
            # torch stores without compression; records larger than their archive are a bomb.
            packings = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            unpacked = sum(each.file_size for each in archive.infolist())
            if unpacked > size or found[0].compress_type not in packings:
                raise RefusedPickleError(f"it is compressed, and would become {unpacked:,} bytes")
            with archive.open(found[0]) as stream:
                return stream.read(size + 1)
    except RefusedPickleError:
        raise
    except _BROKEN_ARCHIVE as error:
        raise DamagedPickleError(str(error)) from error


def _unpickler(data: bytes | mmap.mmap) -> PlainUnpickler:
    return PlainUnpickler(data, _find_class, _persistent_load)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any = (), *_: Any) -> PickledTensor:
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise DamagedPickleError("a tensor without storage, shape and stride")
    if len(shape) > _MAX_DIMENSIONS or len(stride) != len(shape):
        raise DamagedPickleError(f"a tensor of {len(shape)} dimensions and {len(stride)} strides")
    last = offset
    for number in (offset, *shape, *stride):
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise DamagedPickleError("a tensor whose shape or place is no size")
    last += sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if last >= storage.numel and 0 not in shape:
        raise DamagedPickleError(
            f"a tensor of shape {list(shape)} in a storage of {storage.numel:,} elements"
        )
    return PickledTensor(storage.dtype, shape, storage.key, offset, _is_contiguous(shape, stride))


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True


def _rebuild_parameter(tensor: Any, *_: Any) -> PickledTensor:
    if not isinstance(tensor, PickledTensor):
        raise DamagedPickleError("a parameter without a tensor")
    return tensor


def _ordered_dict(items: Any = (), *_: Any) -> dict[Any, Any]:
    # Python 2 pickled it with a list of pairs; everyone since fills it afterwards.
    if not isinstance(items, list | tuple):
        raise DamagedPickleError("an OrderedDict of what is no list")
    found: dict[Any, Any] = {}
    for pair in items:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str | int):
            raise DamagedPickleError("an OrderedDict of what are no pairs")
        found[pair[0]] = pair[1]
    return found


def _size(items: Any = (), *_: Any) -> tuple[Any, ...]:
    if not isinstance(items, list | tuple):
        raise DamagedPickleError("a shape that is no list")
    return tuple(items)


_FUNCTIONS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}
_DTYPES = {
    **{("torch", name): _Dtype(dtype) for name, dtype in _DTYPE_OF_NAME.items()},
    **{
        (module, name): _Dtype(dtype)
        for name, dtype in _DTYPE_OF_STORAGE.items()
        for module in ("torch", "torch.storage")
    },
}


def _find_class(module: str, name: str) -> Callable[..., Any]:
    found = _FUNCTIONS.get((module, name)) or _DTYPES.get((module, name))
    if found is None:
        raise RefusedPickleError(f"its pickle asks for {module[:100]}.{name[:100]}")
    return found


def _any_class(_module: str, _name: str) -> Callable[..., Any]:
    return _anything


def _anything(*_: Any) -> dict[Any, Any]:
    return {}


def _no_storage(_pid: Any) -> None:
    return None


def _persistent_load(pid: Any) -> _Storage:
    # ("storage", type, key, location, numel), and a view's description in old files
    if not isinstance(pid, tuple) or len(pid) < 5 or not isinstance(pid[1], _Dtype):
        raise DamagedPickleError("a storage without type and key")
    if not isinstance(pid[2], str | int) or type(pid[4]) is not int:
        raise DamagedPickleError("a storage without key and size")
    return _Storage(pid[1].name, str(pid[2]), pid[4])


def _flatten(content: Any, size: int) -> dict[str, PickledTensor]:
    """Name the tensors of nested dictionaries.

    Args:
        size: of the pickle in bytes. Dictionaries may be shared, so few bytes can say names without end:
            the text of all names is bounded by it.
    """
    if isinstance(content, PickledTensor):
        return {"": content}
    found: dict[str, PickledTensor] = {}
    levels = [("", id(content), _items(content))]
    left = 64 * size + 4096
    while levels:
        prefix, _, items = levels[-1]
        key, value = next(items, (None, _END))
        if value is _END:
            levels.pop()
            continue
        name = f"{prefix}{key}"
        left -= len(name) + 1
        if isinstance(value, PickledTensor):
            if name in found or len(name) > _MAX_NAME:
                raise RefusedPickleError(f"the tensor name {name[:100]!r} is there twice, or too long")
            found[name] = value
        elif isinstance(value, dict):
            if any(value_id == id(value) for _, value_id, _ in levels) or len(levels) >= _MAX_DEPTH:
                raise RefusedPickleError("its dictionaries hold themselves, or one another without end")
            levels.append((f"{name}.", id(value), _items(value)))
        if left < 0:
            raise RefusedPickleError("its dictionaries share one another, and so name tensors without end")
    return found


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    return iter(value.items()) if isinstance(value, dict) else iter(())
