"""Safetensors headers and shard indexes, read and checked without touching tensor data.

Format: https://huggingface.co/docs/safetensors — eight bytes of little-endian
header length, a JSON header, then the tensors' bytes. Only the header is read
here, so describing a checkpoint of any size takes milliseconds.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qwodel.exceptions import IntegrityError, ValidationError
from qwodel.untrusted import kind_of, open_regular, parse_json, read_json

__all__ = [
    "DTYPE_BITS",
    "SafetensorsHeader",
    "TensorEntry",
    "check_index",
    "checkpoint_files",
    "find_index",
    "read_header",
    "read_index",
]

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of every dtype the safetensors format names."""

_MAX_HEADER = 100_000_000  # the reference implementation's own limit
_MAX_DIMENSIONS = 64  # torch's
_MAX_NAME = 1024  # no network's names come near; expressions are matched against them
_DAMAGED = "download or save the file again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header describes it: ``[begin, end)`` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The header of one file: its tensors in file order, and its string metadata."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    size: int

    def __iter__(self) -> Iterator[TensorEntry]:
        return iter(self.tensors.values())


def read_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read and check the header of the safetensors file at ``path``.

    Raises:
        ValidationError: the file is missing, no regular file, or is not safetensors.
        IntegrityError: the file is truncated, its header is not of the format, or its offsets overlap,
            leave gaps or disagree with shape and dtype.
    """
    path = Path(path)
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _MAX_HEADER:
                raise ValidationError(
                    f"{path} is not a safetensors file (header length {length})",
                    hint="a Git LFS pointer or an HTML page saved by mistake looks like this; download the file again",
                )
            raw = file.read(min(length, size))
        except OSError as error:
            raise ValidationError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) < length:
        raise _truncated(path, size, 8 + length)
    document = parse_json(raw, f"the header of {path}", unique=True, error=IntegrityError, hint=_DAMAGED)
    try:
        metadata = _metadata(document)
        entries = sorted(
            (_entry(name, spec, 8 + length) for name, spec in document.items()),
            key=lambda entry: (entry.begin, entry.end),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} has a damaged safetensors header: {error}", hint=_DAMAGED) from error
    _check_layout(path, entries, 8 + length, size)
    return SafetensorsHeader(path, {entry.name: entry for entry in entries}, metadata, size)


def _metadata(document: Any) -> dict[str, str]:
    """Take the string metadata out of a header."""
    if not isinstance(document, dict):
        raise TypeError("it is no JSON object")
    metadata = document.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError("its __metadata__ does not map strings to strings")
    return metadata


def _entry(name: str, spec: Any, data_start: int) -> TensorEntry:
    if type(spec) is not dict:
        raise TypeError(f"tensor {name[:100]!r} is described by no object")
    dtype, shape, offsets = spec.get("dtype"), spec.get("shape"), spec.get("data_offsets")
    if type(dtype) is not str or type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        raise TypeError(f"tensor {name[:100]!r} has no dtype, shape and pair of data_offsets")
    if len(shape) > _MAX_DIMENSIONS or len(name) > _MAX_NAME:
        raise ValueError(
            f"tensor {name[:100]!r} has {len(shape)} dimensions and a name of {len(name)} characters; "
            f"{_MAX_DIMENSIONS} and {_MAX_NAME} are read"
        )
    for number in shape:
        # JSON's true, 64.9 and "64" are no sizes.
        if type(number) is not int or not 0 <= number < 1 << 63:
            kind = (
                "a negative dimension" if type(number) is int and number < 0 else f"the dimension {number!r}"
            )
            raise ValueError(f"tensor {name!r} has {kind}")
    begin, end = offsets
    if type(begin) is not int or type(end) is not int:
        raise ValueError(f"tensor {name!r} has the offsets {offsets!r:.100}")
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _check_layout(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for entry in entries:
        if entry.dtype not in DTYPE_BITS:
            raise ValidationError(f"{path}: tensor {entry.name!r} has the unknown dtype {entry.dtype}")
        expected = (entry.numel * DTYPE_BITS[entry.dtype] + 7) // 8
        if entry.begin != position or entry.nbytes != expected:
            raise IntegrityError(
                f"{path}: tensor {entry.name!r} covers bytes {entry.begin}–{entry.end}, "
                f"but its shape and place need {position}–{position + expected}",
                hint=_DAMAGED,
            )
        position = entry.end
    if size < position:
        raise _truncated(path, size, position)
    if size > position:
        raise IntegrityError(
            f"{path} has {size - position:,} bytes after its last tensor",
            hint=_DAMAGED,
        )


def _truncated(path: Path, size: int, needed: int) -> IntegrityError:
    return IntegrityError(f"{path} is truncated: it has {size:,} of {needed:,} bytes", hint=_DAMAGED)


def read_index(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a ``*.index.json`` and return its weight map: tensor name → shard's file name.

    Raises:
        ValidationError: the index is unreadable, or names a file outside its own folder.
    """
    path = Path(path)
    document = read_json(path, unique=True)
    pairs = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(pairs, dict) or not all(isinstance(shard, str) for shard in pairs.values()):
        raise ValidationError(
            f"{path} is not a readable shard index: its weight_map does not map names to files"
        )
    for shard in set(pairs.values()):
        inside = PurePosixPath(shard)
        if inside.is_absolute() or ".." in inside.parts or "\\" in shard or not inside.name:
            raise ValidationError(
                f"{path} names the shard {shard!r}, which is outside its folder",
                hint="this index was not written by a saving library; do not trust the checkpoint",
            )
    return {name: PurePosixPath(shard).as_posix() for name, shard in pairs.items()}


def find_index(folder: str | os.PathLike[str], suffix: str = ".safetensors") -> Path | None:
    """Return the shard index of a checkpoint folder, or ``None`` where it has none."""
    return next(iter(sorted(Path(folder).glob(f"*{suffix}.index.json"))), None)


def check_index(path: Path, weight_map: Mapping[str, str], held: Mapping[str, str]) -> None:
    """Compare an index with what its shards hold, in both directions.

    Args:
        path: the index, for messages.
        weight_map: tensor → file name, as the index says.
        held: tensor → file name, as the headers say.

    Raises:
        ValidationError: the index names a tensor that no shard holds, or a shard holds one that the index
            omits or places in another shard.
    """
    if weight_map == held:
        return
    missing = [name for name in weight_map if name not in held]
    omitted = [name for name in held if name not in weight_map]
    moved = [name for name, file in held.items() if weight_map.get(name, file) != file]
    faults = (
        (missing, "names {} that no shard holds"),
        (omitted, "omits {} that its shards hold"),
        (moved, "places {} in another shard than the one that holds it"),
    )
    said = [text.format(_named(names)) for names, text in faults if names]
    raise ValidationError(
        f"{path} {', and '.join(said)}",
        hint="the checkpoint is incomplete, or its index is another one's; download or save it again",
    )


def _named(names: list[str]) -> str:
    listed = ", ".join(repr(name) for name in names[:3]) + (" …" if len(names) > 3 else "")
    return f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} ({listed})"


def checkpoint_files(folder: str | os.PathLike[str], suffix: str = ".safetensors") -> list[Path]:
    """Return the weight files of a checkpoint folder: by its index, else every file with ``suffix``.

    Files whose names mark them as duplicates for other readers (``consolidated*``)
    are left out when others exist. Shards are sorted by name.

    Raises:
        ValidationError: the index is unreadable, leaves its folder, or names a missing shard; a shard is
            no regular file.
    """
    folder = Path(folder)
    index = find_index(folder, suffix)
    if index is not None:
        files = sorted({folder / shard for shard in read_index(index).values()})
        missing = [file.name for file in files if kind_of(file) != "file"]
        if missing:
            raise ValidationError(
                f"{folder} lacks {len(missing)} of {len(files)} shards its index names: {', '.join(missing[:3])}",
                hint="the download is not complete; run it again",
            )
        return files
    found = sorted(file for file in folder.glob(f"*{suffix}") if kind_of(file) == "file")
    original = [file for file in found if not file.name.startswith("consolidated")]
    return original or found
