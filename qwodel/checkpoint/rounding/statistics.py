"""Files of activation statistics: what each layer of a model really sees, kept for later runs.

A safetensors file. Layers that read the same inputs (q, k and v) share one entry; the header's
``qwodel_statistics`` says which layer has which. An entry ``e`` is ``e.gram`` (mean of xxᵀ, fp32
``[N, N]``, optional), ``e.mean`` and ``e.channel_max`` (fp32 ``[N]``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from qwodel.algorithms.gram import InputStatistics
from qwodel.checkpoint.files.output_tensor import OutputTensor, Role
from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.files.writer import PlannedWriter, create_files, pack_files
from qwodel.exceptions import CalibrationError
from qwodel.untrusted import checked_int, checked_path, kind_of, parse_json

__all__ = ["StatisticsEntry", "StatisticsFile", "write_statistics"]

_HEADER = "qwodel_statistics"
_VERSION = 1
_WRAPPERS = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "module.")


@dataclass(frozen=True, slots=True)
class StatisticsEntry:
    """Inputs that one or more layers read.

    Attributes:
        layers: names of the layers, without ``.weight``; the first names the entry.
        columns: input channels.
        count: tokens seen.
        gram: whether there is a Gram matrix.
    """

    layers: tuple[str, ...]
    columns: int
    count: int
    gram: bool = True


def write_statistics(
    path: Path, entries: Iterable[tuple[StatisticsEntry, InputStatistics]], total: Iterable[StatisticsEntry]
) -> None:
    """Write a statistics file, one entry in memory at a time.

    Args:
        path: a new file.
        entries: description and numbers of each entry, in the order of ``total``.
        total: all descriptions, known beforehand because the header comes first.
    """
    described = list(total)
    groups = [_tensors(entry) for entry in described]
    document = {
        "version": _VERSION,
        "entries": {
            entry.layers[0]: {"layers": list(entry.layers), "count": entry.count} for entry in described
        },
    }
    files = pack_files(groups, {_HEADER: json.dumps(document)}, None)
    paths = {files[0].name: path}
    create_files(files, paths)
    with PlannedWriter(files, paths) as writer:
        for entry, statistics in entries:
            name = entry.layers[0]
            if statistics.gram is not None:
                writer.write(f"{name}.gram", statistics.gram.float().contiguous())
            writer.write(f"{name}.mean", statistics.mean)
            writer.write(f"{name}.channel_max", statistics.channel_max)


def _tensors(entry: StatisticsEntry) -> list[OutputTensor]:
    name, n = entry.layers[0], entry.columns
    tensors = [
        OutputTensor(f"{name}.mean", "F32", (n,), Role.DATA),
        OutputTensor(f"{name}.channel_max", "F32", (n,), Role.DATA),
    ]
    return [OutputTensor(f"{name}.gram", "F32", (n, n), Role.DATA), *tensors] if entry.gram else tensors


class StatisticsFile:
    """Reads a statistics file, entry by entry.

    Layers are found by name; a checkpoint may wrap names in ``model.diffusion_model.`` and the like.

    Args:
        path: a file that :func:`write_statistics` wrote.

    Raises:
        CalibrationError: the file is missing or is none of statistics.
        ValidationError: it is not safetensors.
        IntegrityError: it is truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = checked_path(path, error=CalibrationError)
        if kind_of(self.path, error=CalibrationError) != "file":
            raise CalibrationError(
                f"there is no statistics file {self.path}", hint="make one with qwodel calibrate"
            )
        self._reader = UnifiedSafetensorsLoader(self.path, low_memory=True)
        try:
            document = parse_json(self._reader.metadata()[_HEADER], _HEADER, error=CalibrationError)
            entries: Mapping[str, Mapping[str, object]] = document["entries"]
            if document["version"] != _VERSION:
                raise ValueError(f"version {document['version']}")
            self._entry = {
                str(layer): name for name, entry in entries.items() for layer in _list(entry["layers"])
            }
            self._count = {
                name: checked_int(entry["count"], f"the count of {name}", error=CalibrationError)
                for name, entry in entries.items()
            }
            for name in entries:
                self._check_shapes(name)
        except (AttributeError, CalibrationError, KeyError, TypeError, ValueError) as error:
            self._reader.close()
            raise CalibrationError(
                f"{self.path} is no file of activation statistics: {error}",
                hint="make one with qwodel calibrate, or qwodel.modeling.collect_statistics",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer that has statistics."""
        return tuple(self._entry)

    def find(self, layer: str) -> str | None:
        """The name under which ``layer`` is in the file, or ``None``."""
        if layer in self._entry:
            return layer
        for wrapper in _WRAPPERS:
            if layer.startswith(wrapper) and layer.removeprefix(wrapper) in self._entry:
                return layer.removeprefix(wrapper)
            if wrapper + layer in self._entry:
                return wrapper + layer
        return None

    def read(self, layer: str, *, gram: bool = True) -> InputStatistics | None:
        """The statistics of ``layer``'s inputs; ``None`` where the file has none.

        Args:
            gram: read the Gram matrix too, if there is one.

        Raises:
            CalibrationError: there are numbers that are not finite, or a negative maximum.
        """
        found = self.find(layer)
        if found is None:
            return None
        name = self._entry[found]
        wanted = gram and f"{name}.gram" in self._reader
        return InputStatistics(
            self._numbers(f"{name}.gram") if wanted else None,
            self._numbers(f"{name}.mean"),
            self._numbers(f"{name}.channel_max", negative=False),
            self._count[name],
        )

    def _check_shapes(self, name: str) -> None:
        (columns,) = self._reader.get_shape(f"{name}.mean")
        wanted = {"mean": (columns,), "channel_max": (columns,), "gram": (columns, columns)}
        for part, shape in wanted.items():
            if part == "gram" and f"{name}.gram" not in self._reader:
                continue
            entry = self._reader.entry(f"{name}.{part}")
            if entry.dtype != "F32" or entry.shape != shape:
                raise ValueError(f"{entry.name} is {entry.dtype} {list(entry.shape)}, not F32 {list(shape)}")

    def _numbers(self, name: str, *, negative: bool = True) -> torch.Tensor:
        tensor = self._reader.get_tensor(name)
        if not tensor.isfinite().all() or (not negative and (tensor < 0).any()):
            raise CalibrationError(
                f"{self.path}: {name} holds numbers that no activations have (NaN, infinite or negative)",
                hint="make the file again with qwodel calibrate",
            )
        return tensor

    def close(self) -> None:
        """Close the file."""
        self._reader.close()


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError("layers are a list")
    return value
