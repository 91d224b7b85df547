"""Recorded inputs of a layer, in memory or in a directory, as a data set."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from qwodel.exceptions import CalibrationError, ConfigurationError
from qwodel.segquant.calibration_files import Meta, read_chunk, read_meta, require_zstd
from qwodel.untrusted import checked_path

__all__ = ["BaseCalibSet", "DiskCalibSet", "load_calibrate_set"]

Item = Mapping[str, Any]
"""``{"args": positional arguments, "kwargs": keyword arguments}`` of one call, on the CPU."""


class BaseCalibSet(Dataset[Item]):
    """Inputs of single calls of a layer, in the order in which they were recorded."""

    def __init__(self, items: Sequence[Item] = ()) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        return self._items[index]

    def __iter__(self) -> Iterator[Item]:
        return (self[place] for place in range(len(self)))

    def dataloader(self, batch_size: int = 1, *, shuffle: bool = False, seed: int = 0) -> DataLoader[Any]:
        """Return a loader of ``(args, kwargs)``, with ``batch_size`` calls joined along dimension 0.

        Raises:
            CalibrationError: while it is read, calls differ in more than dimension 0.
        """
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(self, batch_size, shuffle=shuffle, generator=generator, collate_fn=_join)


class DiskCalibSet(BaseCalibSet):
    """A set in a directory; one chunk is in memory at a time."""

    def __init__(self, folder: Path, meta: Meta) -> None:
        super().__init__()
        self._folder, self._meta = folder, meta
        self._ends = list(accumulate(meta.chunk_lens))
        self._loaded: tuple[int, list[Item]] = (-1, [])

    def __len__(self) -> int:
        return self._meta.stored

    def __getitem__(self, index: int) -> Item:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        chunk = bisect_right(self._ends, place)
        if self._loaded[0] != chunk:
            self._loaded = chunk, read_chunk(self._folder, self._meta, chunk)
        return self._loaded[1][place - (self._ends[chunk - 1] if chunk else 0)]


def load_calibrate_set(dump_path: str | Path, compress: bool = True) -> BaseCalibSet | None:
    """Open a set that ``generate_calibrate_set`` stored.

    Args:
        dump_path: its directory.
        compress: whether it was stored compressed.

    Returns:
        The set, or ``None`` where there is none.

    Raises:
        CalibrationError: its sampling has not come to its end, or the directory is something else.
        ConfigurationError: ``compress`` is not as it was stored.
        DependencyError: it is compressed, and zstandard is missing.
    """
    folder = checked_path(dump_path, error=CalibrationError)
    meta = read_meta(folder)
    if meta is None:
        return None
    if meta.compress != compress:
        raise ConfigurationError(
            f"the calibration set in {folder} is stored {'' if meta.compress else 'un'}compressed",
            hint=f"give compress={meta.compress}",
        )
    if not meta.complete:
        raise CalibrationError(
            f"the calibration set in {folder} is not complete: sampling ended early, in run {meta.run}",
            hint="call generate_calibrate_set with the same arguments to go on",
        )
    if compress:
        require_zstd()
    return DiskCalibSet(folder, meta)


def _join(items: Sequence[Item]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return one call's arguments, or several calls' as one."""
    calls = [(tuple(item["args"]), dict(item["kwargs"])) for item in items]
    if len(calls) == 1:
        return calls[0]
    flat = [pytree.tree_flatten(call) for call in calls]
    if any(structure != flat[0][1] for _, structure in flat):
        raise _unlike("their arguments differ")
    sizes = [_batch(leaves) for leaves, _ in flat]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    joined = pytree.tree_unflatten([_join_leaves(list(column), sizes) for column in columns], flat[0][1])
    args, kwargs = joined
    return args, kwargs


def _batch(leaves: Sequence[Any]) -> int:
    return next((len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim > 1), 1)


def _join_leaves(column: list[Any], sizes: list[int]) -> Any:
    first = column[0]
    if not isinstance(first, torch.Tensor):
        if any(leaf != first for leaf in column):
            raise _unlike(f"{first!r} and others")
        return first
    # One timestep for a whole call becomes one for each of its entries.
    rows = [
        leaf.reshape(-1).expand(size) if leaf.ndim == 0 or (leaf.ndim == 1 and len(leaf) == 1) else leaf
        for leaf, size in zip(column, sizes, strict=True)
    ]
    if any(leaf.shape[1:] != rows[0].shape[1:] for leaf in rows):
        raise _unlike(" and ".join(str(tuple(leaf.shape)) for leaf in rows[:2]))
    return torch.cat(rows)


def _unlike(what: str) -> CalibrationError:
    return CalibrationError(f"recorded calls cannot be joined into a batch: {what}", hint="give batch_size=1")
