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

__all__ = ["Meta", "read_chunk", "read_meta", "require_zstd", "write_chunk", "write_meta"]

_FORMAT = "qwodel-calibration-set"
_VERSION = 1
_LEVEL = 3


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
        CalibrationError: the directory is something else, or of another version.
    """
    file = folder / "meta.json"
    if not file.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CalibrationError(
                f"{folder} is no calibration set: it has no meta.json", hint="give another dump_path"
            )
        return None
    try:
        document = json.loads(file.read_text("utf-8"))
        if document.pop("format") != _FORMAT or document.pop("version") != _VERSION:
            raise ValueError("another format or version")
        return Meta(**document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(
            f"{file} does not describe a calibration set of this version: {error}",
            hint="remove the directory to sample anew",
        ) from error


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
        IntegrityError: the file is missing or not as it was written.
    """
    file = _chunk(folder, meta, place)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{file} cannot be read: {error.strerror}", hint="sample anew") from error
    if hashlib.sha256(data).hexdigest() != meta.sha256[place]:
        raise IntegrityError(f"{file} is not as it was written", hint="remove the directory to sample anew")
    if meta.compress:
        data = require_zstd().ZstdDecompressor().decompress(data)
    items: list[Mapping[str, Any]] = torch.load(io.BytesIO(data), weights_only=True)
    return items


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
