"""Writing safetensors files whose layout is known before their data.

Headers go first and every tensor has its place, so tensors may arrive in any
order and from several processes; the bytes are the same.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from qwodel.checkpoint.files.output_tensor import OutputTensor
from qwodel.exceptions import ResourceError
from qwodel.safetensors_files import DTYPE_BITS

__all__ = ["FilePlan", "PlannedWriter", "create_files", "index_bytes", "pack_files"]


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One output file: its header bytes, and where each tensor's data begins."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def pack_files(
    groups: Sequence[Sequence[OutputTensor]],
    metadata: Mapping[str, str],
    max_bytes: int | None,
    stem: str = "model",
) -> tuple[FilePlan, ...]:
    """Lay tensors out in files.

    Args:
        groups: tensors that stay together (codes and their scales), in order.
        metadata: string metadata of every file.
        max_bytes: tensor bytes of a file; a group larger than that has a file of its
            own. ``None`` puts all into one.
        stem: ``model`` gives ``model.safetensors`` or ``model-00001-of-00003.safetensors``.
    """
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for group in groups:
        size = sum(tensor.nbytes for tensor in group)
        if max_bytes is not None and shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    count = len(shards)
    return tuple(
        _pack(
            f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors",
            shard,
            metadata,
        )
        for number, shard in enumerate(shards, start=1)
    )


def _pack(name: str, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> FilePlan:
    # Wide dtypes first keeps every tensor aligned to its own element.
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, position = {}, 0
    for tensor in ordered:
        begins[tensor.name] = position
        end = position + tensor.nbytes
        document[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {tensor: len(header) + begin for tensor, begin in begins.items()}
    return FilePlan(name, header, offsets, len(header) + position)


def index_bytes(files: Sequence[FilePlan]) -> bytes:
    """Return the ``model.safetensors.index.json`` of several shards."""
    total = sum(file.size - len(file.header) for file in files)
    weight_map = {tensor: file.name for file in files for tensor in file.offsets}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def create_files(files: Sequence[FilePlan], paths: Mapping[str, Path]) -> None:
    """Create every file at its full size with its header in place.

    Raises:
        ResourceError: the disk has no room for all of them.
    """
    for file in files:
        path = paths[file.name]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as handle:
            handle.write(file.header)
            handle.flush()
            _reserve(handle.fileno(), file.size, path)


def _reserve(descriptor: int, size: int, path: Path) -> None:
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"{path.parent} has no room for {path.name} ({size:,} bytes)", hint="free some space"
            ) from error
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


class PlannedWriter:
    """Writes tensor bytes to their places in files that :func:`create_files` made.

    Args:
        files: the plan of every file.
        paths: file name in the plan → path.
    """

    def __init__(self, files: Sequence[FilePlan], paths: Mapping[str, Path]) -> None:
        self._places = {name: (file.name, begin) for file in files for name, begin in file.offsets.items()}
        self._paths = paths
        self._descriptors: dict[str, int] = {}

    def write(self, tensor: str, data: torch.Tensor | bytes, at: int = 0) -> int:
        """Write ``data`` at byte ``at`` of ``tensor`` and return the number of bytes."""
        file, begin = self._places[tensor]
        if isinstance(data, torch.Tensor):
            flat = data.contiguous().view(-1).view(torch.uint8)
            view = memoryview(flat.numpy().data)
        else:
            view = memoryview(data)
        total, position = len(view), begin + at
        while len(view):
            wrote = os.pwrite(self._descriptor(file), view, position)
            view, position = view[wrote:], position + wrote
        return total

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self._paths[file], os.O_WRONLY | getattr(os, "O_CLOEXEC", 0))
        return self._descriptors[file]
