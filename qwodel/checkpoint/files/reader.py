"""Reading safetensors checkpoints tensor by tensor, or rows of a tensor at a time.

Headers are read first and tensors on demand, so opening a checkpoint of any
size costs milliseconds. Tensor bytes come by memory map, or by ranged reads
where resident memory must stay low.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from qwodel.checkpoint.files.dtypes import torch_dtype
from qwodel.checkpoint.files.headers import CheckpointHeaders
from qwodel.exceptions import IntegrityError, ValidationError
from qwodel.safetensors_files import DTYPE_BITS, SafetensorsHeader, TensorEntry

__all__ = ["UnifiedSafetensorsLoader"]


class UnifiedSafetensorsLoader:
    """One view of all tensors of a checkpoint: a file, or a directory of shards.

    Args:
        path: a ``.safetensors`` file, or a directory that holds some (through
            its index when there is one). PyTorch files are read in place, too, where there
            are no safetensors; nothing in them is executed. Where headers are given, which
            somebody has read before, they are not parsed again.
        low_memory: read each tensor with ranged reads into memory of its own,
            instead of mapping the files. A memory map is quicker for repeated
            access, but every page touched stays resident until
            :meth:`mark_processed`.

    Raises:
        ValidationError: there are no weight files, two files hold the
            same tensor, or the index says otherwise than the headers.
        IntegrityError: a file is truncated or damaged.
    """

    def __init__(self, path: str | os.PathLike[str] | CheckpointHeaders, low_memory: bool = False) -> None:
        headers = path if isinstance(path, CheckpointHeaders) else CheckpointHeaders.read(Path(path))
        self.path = headers.path
        self.low_memory = low_memory
        self._headers = headers.headers
        self._entries = headers.places()
        self._descriptors: dict[Path, int] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._closed = False

    def keys(self) -> list[str]:
        """Return the names of all tensors, in file order."""
        return list(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def metadata(self) -> dict[str, str]:
        """Return the string metadata of all files; of equal keys the first file's value."""
        merged: dict[str, str] = {}
        for header in self._headers:
            merged = {**header.metadata, **merged}
        return merged

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Name → header entry (dtype, shape, place) of every tensor."""
        return {name: entry for name, (_, entry) in self._entries.items()}

    @property
    def files(self) -> list[Path]:
        """The files read, sorted by name."""
        return [header.path for header in self._headers]

    def entry(self, key: str) -> TensorEntry:
        """Return the header entry of ``key``.

        Raises:
            ValidationError: the checkpoint has no such tensor.
        """
        return self._locate(key)[1]

    def get_shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key`` without reading its data."""
        return self.entry(key).shape

    def get_ndim(self, key: str) -> int:
        """Return the number of dimensions of ``key`` without reading its data."""
        return len(self.entry(key).shape)

    def get_tensor(self, key: str) -> torch.Tensor:
        """Return tensor ``key``, of its stored dtype, on the CPU.

        With ``low_memory=False`` the tensor is a private view of the mapped
        file: it may be modified, the file is not. F4 tensors come as
        ``float4_e2m1fn_x2`` with half as many columns.
        """
        header, entry = self._locate(key)
        dtype = torch_dtype(entry.dtype)
        if self.low_memory or entry.nbytes == 0 or entry.begin % dtype.itemsize:
            data = self.read_bytes(key)
        else:
            data = torch.frombuffer(self._map(header.path), dtype=torch.uint8)[entry.begin : entry.end]
        return data.view(dtype).reshape(_torch_shape(entry))

    def get_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Return rows ``[start, stop)`` along the first dimension, by a ranged read of those bytes alone."""
        entry = self.entry(key)
        shape = _torch_shape(entry)
        dtype = torch_dtype(entry.dtype)
        row_bytes = entry.nbytes // entry.shape[0] if entry.shape[0] else 0
        if row_bytes * entry.shape[0] != entry.nbytes:
            raise ValidationError(f"rows of {key!r} ({entry.dtype}, {list(entry.shape)}) are not whole bytes")
        data = self.read_bytes(key, start * row_bytes, stop * row_bytes)
        return data.view(dtype).reshape((stop - start, *shape[1:]))

    def read_bytes(self, key: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return bytes ``[start, stop)`` of the data of ``key`` as a uint8 tensor of its own memory.

        Raises:
            IntegrityError: the file ends before the tensor does.
        """
        header, entry = self._locate(key)
        stop = entry.nbytes if stop is None else stop
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        view = memoryview(buffer.numpy().data)
        descriptor, position = self._descriptor(header.path), entry.begin + start
        while len(view):
            got = os.preadv(descriptor, [view], position)
            if got == 0:
                raise IntegrityError(
                    f"{header.path} ended inside tensor {key!r}", hint="the file changed while it was read"
                )
            view, position = view[got:], position + got
        return buffer

    def mark_processed(self, key: str) -> None:
        """Give the resident pages of ``key`` back; reading it again is allowed and costs a disk read."""
        header, entry = self._locate(key)
        mapped = self._maps.get(header.path)
        if mapped is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        # Pages shared with neighbours stay.
        begin = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def close(self) -> None:
        """Close all files. Tensors already handed out stay valid."""
        self._closed = True
        # Maps are let go, not closed: a tensor that still views one keeps it alive.
        self._maps.clear()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _locate(self, key: str) -> tuple[SafetensorsHeader, TensorEntry]:
        try:
            return self._entries[key]
        except KeyError:
            raise ValidationError(f"{self.path} has no tensor {key!r}") from None

    def _descriptor(self, path: Path) -> int:
        if self._closed:
            raise ValueError("the loader is closed")
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._descriptors[path]

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            # A private map is writable, as torch wants its buffers, without touching the file.
            self._maps[path] = mmap.mmap(self._descriptor(path), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


def _torch_shape(entry: TensorEntry) -> tuple[int, ...]:
    if DTYPE_BITS[entry.dtype] >= 8 or not entry.shape:
        return entry.shape
    return (*entry.shape[:-1], entry.shape[-1] * DTYPE_BITS[entry.dtype] // 8)
