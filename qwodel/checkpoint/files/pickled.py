"""PyTorch checkpoints read in place: where each tensor's bytes lie in the archive that torch.save wrote.

The pickle is walked through, never executed (:mod:`qwodel.torch_pickle`); torch stores the tensors beside
it without compression, so each can be read by range, as from safetensors.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from qwodel.checkpoint.files.dtypes import nbytes
from qwodel.exceptions import IntegrityError, ValidationError
from qwodel.safetensors_files import SafetensorsHeader, TensorEntry
from qwodel.torch_pickle import PickledTensor, read_pickled_tensors
from qwodel.untrusted import open_regular

__all__ = ["PICKLED", "read_pickled_header"]

PICKLED = (".bin", ".pt", ".pth")
"""Endings of files that torch.save writes."""

_LOCAL_HEADER = 30  # bytes of a zip record's own header, before its name
_SAVE_AGAIN = "load it with torch and save its state dict as safetensors"


def read_pickled_header(path: Path) -> SafetensorsHeader:
    """Describe a PyTorch checkpoint as a safetensors file is described: entries count bytes from its start.

    Raises:
        ValidationError: it is no checkpoint of plain tensors, older than torch 1.6, from a big-endian machine, or
            holds a tensor that is no plain stretch of its storage.
        IntegrityError: it is damaged.
    """
    tensors = read_pickled_tensors(path)
    with open_regular(path) as file:
        size = file.seek(0, 2)
        places = _places(file, path)
    entries = {name: _entry(path, name, tensor, places) for name, tensor in tensors.items()}
    return SafetensorsHeader(path, entries, {}, size)


def _places(file: BinaryIO, path: Path) -> Mapping[str, tuple[int, int]]:
    """Storage key → where its bytes begin, and how many they are."""
    if not zipfile.is_zipfile(file):
        raise ValidationError(f"{path} was saved by a torch before 1.6", hint=_SAVE_AGAIN)
    found = {}
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            folder, _, key = record.filename.rpartition("/")
            if key == "byteorder" and archive.read(record) != b"little":
                raise ValidationError(f"{path} was saved on a big-endian machine", hint=_SAVE_AGAIN)
            if not folder.endswith("/data"):
                continue
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValidationError(f"{path} is compressed", hint=_SAVE_AGAIN)
            file.seek(record.header_offset)
            header = file.read(_LOCAL_HEADER)
            if len(header) < _LOCAL_HEADER:
                raise IntegrityError(f"{path} is truncated", hint="download or save the file again")
            name, extra = struct.unpack("<HH", header[26:30])
            found[key] = (record.header_offset + _LOCAL_HEADER + name + extra, record.file_size)
    return found


def _entry(
    path: Path, name: str, tensor: PickledTensor, places: Mapping[str, tuple[int, int]]
) -> TensorEntry:
    if not tensor.contiguous:
        raise ValidationError(f"{path}: tensor {name!r} is a view of another", hint=_SAVE_AGAIN)
    size = nbytes(tensor.dtype, tensor.shape)
    start, length = places.get(tensor.storage, (0, -1))
    begin = nbytes(tensor.dtype, (tensor.offset,))
    if begin + size > length and size:
        raise IntegrityError(
            f"{path} lacks the numbers of tensor {name!r}", hint="download or save the file again"
        )
    return TensorEntry(name, tensor.dtype, tensor.shape, start + begin, start + begin + size)
