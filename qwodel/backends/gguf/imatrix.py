"""Importance matrices in llama.cpp's two file formats.

An entry holds, per input channel of one weight (and per expert, for stacked
experts), the sum of squared activations and the number of tokens it was summed
over. The GGUF form stores both; the legacy form stores means times calls.
Entries an expert never saw are ones when they are used, as in llama.cpp's own
quantize tool. Format: llama.cpp ``tools/imatrix`` and ``common/imatrix-loader``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from qwodel.exceptions import CalibrationError, IntegrityError
from qwodel.gguf_header import GGUFArray, GGUFHeader, read_gguf_header
from qwodel.untrusted import checked_int, checked_path, kind_of, open_regular

__all__ = ["ImatrixEntry", "ImportanceMatrix", "read_imatrix", "write_imatrix"]

Floats = npt.NDArray[np.float32]
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImatrixEntry:
    """One weight: ``sums`` [matrices, channels] of squared activations, ``counts`` [matrices] of tokens."""

    sums: Floats
    counts: Floats

    @property
    def coverage(self) -> float:
        """The share of matrices (experts) that saw any token."""
        return float(np.count_nonzero(self.counts)) / max(self.counts.size, 1)

    def weights(self) -> Floats:
        """Return mean squared activations, flat; ones for matrices without data."""
        counts = self.counts[:, None]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            means = np.where(counts > 0, self.sums / counts, np.float32(1))
        return np.ascontiguousarray(means.reshape(-1), np.float32)


@dataclass(frozen=True)
class ImportanceMatrix:
    """Entries by tensor name, and what they were computed from."""

    entries: Mapping[str, ImatrixEntry]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    legacy: bool = field(default=False, compare=False)

    def weights(self) -> dict[str, Floats]:
        """Return what ``llama_model_quantize`` takes: flat mean squares by tensor name."""
        return {name: entry.weights() for name, entry in self.entries.items()}

    def partial(self) -> dict[str, float]:
        """Return the coverage of entries that lack data for some experts."""
        return {name: entry.coverage for name, entry in self.entries.items() if entry.coverage < 1}


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix in either format.

    Raises:
        CalibrationError: the file is missing, damaged, or is no importance matrix.
    """
    path = checked_path(path, error=CalibrationError)
    if kind_of(path, error=CalibrationError) is None:
        raise CalibrationError(f"the importance matrix {path} does not exist")
    with open_regular(path, error=CalibrationError) as file:
        try:
            is_gguf = file.read(4) == b"GGUF"
            file.seek(0)
            matrix = _read_gguf(path) if is_gguf else _read_legacy(file)
        except (OSError, ValueError, struct.error, IntegrityError) as error:
            raise CalibrationError(f"{path} is not a readable importance matrix: {error}") from error
    for name, entry in matrix.entries.items():
        # A count near zero makes a mean that no float holds.
        for values in (entry.sums, entry.counts, entry.weights()):
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise CalibrationError(
                    f"{path}: the entry of {name} has values that are negative or not finite",
                    hint="make the importance matrix again",
                )
    return matrix


def _read_gguf(path: Path) -> ImportanceMatrix:
    header = read_gguf_header(path)
    missing = [
        key for key in ("datasets", "chunk_count", "chunk_size") if f"imatrix.{key}" not in header.metadata
    ]
    if missing:
        raise ValueError(f"it is a GGUF file without imatrix.{missing[0]}")
    entries = {}
    for name in header.tensors:
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        if weight + _COUNTS not in header.tensors:
            raise ValueError(f"{weight} has sums without counts")
        counts = _tensor(header, weight + _COUNTS).reshape(-1)
        sums = _tensor(header, name)
        if not counts.size or not sums.size or sums.size % counts.size:
            raise ValueError(f"{weight} has {sums.size} sums and {counts.size} counts")
        entries[weight] = ImatrixEntry(sums.reshape(counts.size, -1), counts)
    if not entries:
        raise ValueError("it has no entries")
    datasets = header.metadata["imatrix.datasets"]
    names = datasets.decode() if isinstance(datasets, GGUFArray) else []
    return ImportanceMatrix(
        entries,
        tuple(name for name in names if isinstance(name, str)),
        checked_int(header.metadata["imatrix.chunk_count"], "imatrix.chunk_count"),
        checked_int(header.metadata["imatrix.chunk_size"], "imatrix.chunk_size"),
    )


def _tensor(header: GGUFHeader, name: str) -> Floats:
    tensor = header.tensors[name]
    if tensor.type != "F32":
        raise ValueError(f"{name} is {tensor.type}, not F32")
    return np.fromfile(header.path, np.float32, tensor.numel, offset=tensor.begin).reshape(tensor.shape)


def _read_legacy(file: BinaryIO) -> ImportanceMatrix:
    entries: dict[str, ImatrixEntry] = {}
    (count,) = _unpack(file, "<i")
    if not 0 < count < 1 << 20:
        raise ValueError("it is in neither of llama.cpp's formats")
    for _ in range(count):
        name = _bytes(file, _unpack(file, "<i")[0]).decode("utf-8")
        calls, size = _unpack(file, "<ii")
        if size < 1 or name in entries:
            raise ValueError(f"the entry of {name[:100]} is {'empty' if size < 1 else 'there twice'}")
        values = np.frombuffer(_bytes(file, 4 * size), np.float32)
        # A stored value is mean · calls, so sums over one matrix with ``calls`` counts mean the same.
        entries[name] = ImatrixEntry(values[None], np.array([max(calls, 1)], np.float32))
    tail = file.read(8)
    chunks, length = struct.unpack("<ii", tail) if len(tail) == 8 else (0, 0)
    dataset = _bytes(file, length).decode("utf-8", "replace") if length > 0 else ""
    return ImportanceMatrix(entries, (dataset,) if dataset else (), chunks, 0, legacy=True)


def _bytes(file: BinaryIO, size: int) -> bytes:
    """The next ``size`` bytes, asked for only where the file has them."""
    left = os.fstat(file.fileno()).st_size - file.tell()
    if not 0 <= size <= left:
        raise ValueError(f"it has {left:,} more bytes where {size:,} are announced")
    return file.read(size)


def _unpack(file: BinaryIO, code: str) -> tuple[Any, ...]:
    return struct.unpack(code, file.read(struct.calcsize(code)))


def write_imatrix(matrix: ImportanceMatrix, path: Path) -> None:
    """Write ``matrix`` to ``path`` in llama.cpp's GGUF form, entries in name order."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch="imatrix")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(matrix.datasets) or ["unknown"])
    writer.add_uint32("imatrix.chunk_count", matrix.chunk_count)
    writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
    for name, entry in sorted(matrix.entries.items()):
        writer.add_tensor(name + _SUMS, np.ascontiguousarray(entry.sums, np.float32))
        writer.add_tensor(name + _COUNTS, np.ascontiguousarray(entry.counts[:, None], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
