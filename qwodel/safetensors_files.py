"""Safetensors headers and shard indexes, read and checked without touching tensor data.

Format: https://huggingface.co/docs/safetensors — eight bytes of little-endian
header length, a JSON header, then the tensors' bytes. Only the header is read
here, so describing a checkpoint of any size takes milliseconds.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qwodel.exceptions import IntegrityError, ValidationError

__all__ = [
    "DTYPE_BITS",
    "SafetensorsHeader",
    "TensorEntry",
    "checkpoint_files",
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
        return self.end - self.begin

    @property
    def numel(self) -> int:
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
        ValidationError: the file is missing or is not safetensors.
        IntegrityError: the file is truncated, or its offsets overlap, leave
            gaps or disagree with shape and dtype.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _MAX_HEADER:
                raise ValidationError(
                    f"{path} is not a safetensors file (header length {length})",
                    hint="a Git LFS pointer or an HTML page saved by mistake looks like this; download the file again",
                )
            raw = file.read(length)
    except FileNotFoundError as error:
        raise ValidationError(f"{path} does not exist") from error
    except OSError as error:
        raise ValidationError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) < length:
        raise _truncated(path, size, 8 + length)
    try:
        document = json.loads(raw)
        metadata = document.pop("__metadata__", None) or {}
        entries = sorted(
            (_entry(name, spec, 8 + length) for name, spec in document.items()),
            key=lambda entry: (entry.begin, entry.end),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{path} has a damaged safetensors header: {error}", hint="download or save the file again"
        ) from error
    _check_layout(path, entries, 8 + length, size)
    return SafetensorsHeader(path, {entry.name: entry for entry in entries}, metadata, size)


def _entry(name: str, spec: Mapping[str, Any], data_start: int) -> TensorEntry:
    begin, end = spec["data_offsets"]
    shape = tuple(int(n) for n in spec["shape"])
    if any(n < 0 for n in shape):
        raise ValueError(f"tensor {name!r} has a negative dimension")
    return TensorEntry(name, str(spec["dtype"]), shape, data_start + int(begin), data_start + int(end))


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
                hint="download or save the file again",
            )
        position = entry.end
    if size < position:
        raise _truncated(path, size, position)
    if size > position:
        raise IntegrityError(
            f"{path} has {size - position:,} bytes after its last tensor",
            hint="download or save the file again",
        )


def _truncated(path: Path, size: int, needed: int) -> IntegrityError:
    return IntegrityError(
        f"{path} is truncated: it has {size:,} of {needed:,} bytes", hint="download or save the file again"
    )


def read_index(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a ``*.index.json`` and return its weight map: tensor name → shard's file name.

    Raises:
        ValidationError: the index is unreadable, or names a file outside its own folder.
    """
    path = Path(path)
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        pairs = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValidationError(f"{path} is not a readable shard index: {error!r}") from error
    for shard in set(pairs.values()):
        inside = PurePosixPath(shard)
        if inside.is_absolute() or ".." in inside.parts or "\\" in shard or not inside.name:
            raise ValidationError(
                f"{path} names the shard {shard!r}, which is outside its folder",
                hint="this index was not written by a saving library; do not trust the checkpoint",
            )
    return pairs


def checkpoint_files(folder: str | os.PathLike[str], suffix: str = ".safetensors") -> list[Path]:
    """Return the weight files of a checkpoint folder: by its index, else every file with ``suffix``.

    Files whose names mark them as duplicates for other readers (``consolidated*``)
    are left out when others exist. Shards are sorted by name.

    Raises:
        ValidationError: the index is unreadable, leaves its folder, or names a missing shard.
    """
    folder = Path(folder)
    indexes = sorted(folder.glob(f"*{suffix}.index.json"))
    if indexes:
        files = sorted({folder / shard for shard in read_index(indexes[0]).values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValidationError(
                f"{folder} lacks {len(missing)} of {len(files)} shards its index names: {', '.join(missing[:3])}",
                hint="the download is not complete; run it again",
            )
        return files
    found = sorted(file for file in folder.glob(f"*{suffix}") if file.is_file())
    original = [file for file in found if not file.name.startswith("consolidated")]
    return original or found
