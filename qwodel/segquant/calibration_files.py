"""A calibration set in a directory: chunks of recorded inputs, and what they were made with.

``chunk_000.pt`` (``.pt.zst`` where compressed) is ``torch.save`` of a list of
``{"args": tuple, "kwargs": dict}``. ``meta.json`` names the chunks with their lengths and SHA-256,
the settings, and how far sampling has come. A chunk is written first and ``meta.json`` after it, each in one
rename, so what ``meta.json`` lists is whole whatever is killed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwodel.exceptions import CalibrationError, DependencyError, IntegrityError
from qwodel.extras import install_hint
from qwodel.output import disk_errors
from qwodel.torch_pickle import check_torch_file
from qwodel.untrusted import checked_int, foreign_errors, kind_of, read_json_object, read_regular

__all__ = ["Meta", "read_chunk", "read_meta", "require_zstd", "write_chunk", "write_meta"]

_FORMAT = "qwodel-calibration-set"
_VERSION = 1
_LEVEL = 3
_MAX_ITEMS = 1 << 31
_MAX_CHUNK = 1 << 40
_FREE_BYTES = 1 << 26
_MAX_RATIO = 100


@dataclass
class Meta:
    """Contents of ``meta.json``.

    ``settings`` and the digests of the sampling ``inputs`` tell whether a set is the one that is asked
    for. ``calls`` is the number of calls a run makes, where it was counted. Sampling run ``run`` is
    the first that is not wholly stored, ``within`` the number of its items that are.
    """

    settings: dict[str, Any]
    compress: bool
    chunk_size: int
    chunk_lens: list[int] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    calls: int | None = None
    run: int = 0
    within: int = 0
    complete: bool = False

    @property
    def stored(self) -> int:
        """Number of items in all chunks."""
        return sum(self.chunk_lens)


def require_zstd() -> Any:
    """Return the zstandard module.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise DependencyError(
            "compressed calibration sets need the package zstandard",
            hint=f"{install_hint('segquant')}; or compress=False",
        ) from error
    return zstandard


def read_meta(folder: Path) -> Meta | None:
    """Return what ``folder`` holds, ``None`` where there is no set.

    Raises:
        CalibrationError: the directory is something else, of another version, or damaged.
    """
    file = folder / "meta.json"
    if kind_of(file, error=CalibrationError) != "file":
        kind = kind_of(folder, error=CalibrationError)
        if kind == "file" or (kind == "directory" and any(folder.iterdir())):
            raise CalibrationError(
                f"{folder} is no calibration set: it has no meta.json", hint="give another dump_path"
            )
        return None
    document = read_json_object(file, error=CalibrationError)
    try:
        if document.pop("format") != _FORMAT or document.pop("version") != _VERSION:
            raise ValueError("another format or version")
        meta = Meta(**document)
        _check(meta)
    except (KeyError, TypeError, ValueError, CalibrationError) as error:
        raise CalibrationError(
            f"{file} does not describe a calibration set of this version: {error}",
            hint="remove the directory to sample anew",
        ) from error
    return meta


def _check(meta: Meta) -> None:
    """Refuse a ``meta.json`` whose values are of other types than were written."""
    for name in ("compress", "complete"):
        if not isinstance(getattr(meta, name), bool):
            raise TypeError(f"{name} is not true or false")
    if not isinstance(meta.settings, dict):
        raise TypeError("settings is not an object")
    for name in ("chunk_lens", "sha256", "inputs"):
        if not isinstance(getattr(meta, name), list):
            raise TypeError(f"{name} is not a list")
    if not all(isinstance(digest, str) for digest in (*meta.sha256, *meta.inputs)):
        raise TypeError("a digest is not a string")
    if len(meta.sha256) != len(meta.chunk_lens):
        raise ValueError(f"{len(meta.chunk_lens)} chunks have {len(meta.sha256)} digests")
    counts = {"chunk_size": meta.chunk_size, "run": meta.run, "within": meta.within}
    if meta.calls is not None:
        counts["calls"] = meta.calls
    for name, value in counts.items():
        checked_int(value, name, high=_MAX_ITEMS)
    for length in meta.chunk_lens:
        checked_int(length, "the length of a chunk", low=1, high=_MAX_ITEMS)


def write_meta(folder: Path, meta: Meta) -> None:
    """Replace ``meta.json`` in one rename."""
    document = {"format": _FORMAT, "version": _VERSION, **asdict(meta)}
    _write(folder / "meta.json", (json.dumps(document, indent=1) + "\n").encode())


def write_chunk(folder: Path, meta: Meta, items: list[dict[str, Any]]) -> None:
    """Write the next chunk and list it in ``meta``, which the caller then stores."""
    buffer = io.BytesIO()
    torch.save(items, buffer)
    data = buffer.getvalue()
    if meta.compress:
        data = require_zstd().ZstdCompressor(level=_LEVEL).compress(data)
    _write(_chunk(folder, meta, len(meta.chunk_lens)), data)
    meta.chunk_lens.append(len(items))
    meta.sha256.append(hashlib.sha256(data).hexdigest())


def read_chunk(folder: Path, meta: Meta, place: int) -> list[Mapping[str, Any]]:
    """Return the items of a chunk; nothing but tensors and plain values is unpickled.

    Raises:
        IntegrityError: the file is missing, not as it was written, or holds something else.
    """
    file = _chunk(folder, meta, place)
    data = read_regular(file, limit=_MAX_CHUNK, error=IntegrityError)
    if hashlib.sha256(data).hexdigest() != meta.sha256[place]:
        raise IntegrityError(f"{file} is not as it was written", hint="remove the directory to sample anew")
    with foreign_errors(
        f"{file} is damaged", error=IntegrityError, hint="remove the directory to sample anew"
    ):
        if meta.compress:
            data = _decompressed(data)
        stream = io.BytesIO(data)
        check_torch_file(stream, str(file))
        items: Any = torch.load(stream, weights_only=True)
    if not isinstance(items, list) or len(items) != meta.chunk_lens[place]:
        raise IntegrityError(f"{file} holds no list of {meta.chunk_lens[place]:,} calls")
    for item in items:
        if not (
            isinstance(item, Mapping)
            and isinstance(item.get("args"), list | tuple)
            and isinstance(item.get("kwargs"), Mapping)
        ):
            raise IntegrityError(f"{file} holds an item that is no call with args and kwargs")
    return items


def _decompressed(data: bytes) -> bytes:
    zstd = require_zstd()
    size = zstd.frame_content_size(data)
    # Recorded tensors shrink little; a frame that says far more than it holds would fill the memory.
    if not 0 <= size <= _FREE_BYTES + _MAX_RATIO * len(data):
        raise ValueError(f"{len(data):,} compressed bytes would become {size:,}")
    found: bytes = zstd.ZstdDecompressor().decompress(data)
    return found


def _chunk(folder: Path, meta: Meta, place: int) -> Path:
    return folder / f"chunk_{place:03d}.pt{'.zst' if meta.compress else ''}"


def _write(file: Path, data: bytes) -> None:
    aside = file.with_name(f".{file.name}.part")
    with disk_errors(f"writing {file}"):
        with aside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
