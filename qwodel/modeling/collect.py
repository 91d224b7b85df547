"""Collecting activation statistics of any torch module: diffusion transformers, encoders, anything that runs."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qwodel.algorithms.gram import InputStatistics
from qwodel.checkpoint.rounding.statistics import StatisticsEntry, write_statistics
from qwodel.exceptions import CalibrationError, ConfigurationError
from qwodel.modeling.model_blocks import ModelBlocks, layer_name
from qwodel.modeling.observe.gram import GramSums, InputGroup
from qwodel.modeling.observe.layers import LayerId, is_fused_experts, is_linear
from qwodel.modeling.observe.watcher import Watcher
from qwodel.modeling.stepwise import Arrival
from qwodel.output import StagedOutput, disk_errors
from qwodel.progress import Progress, ProgressCallback
from qwodel.report import envelope

__all__ = ["collect_blockwise", "collect_statistics", "kept_statistics", "run_batch"]

log = logging.getLogger(__name__)

DEFAULT_MEMORY = 4 << 30
"""Bytes of Gram matrices held in memory before further ones are spilled to disk."""


def collect_statistics(
    module: nn.Module,
    batches: Iterable[Any],
    path: Path | str,
    *,
    layers: Sequence[str] | None = None,
    gram: bool = True,
    even: bool = False,
    memory: int = DEFAULT_MEMORY,
    scratch: Path | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress_callback: ProgressCallback | None = None,
    overwrite: bool = False,
) -> Path:
    """Run a module on calibration batches and keep what its linear layers read.

    The module runs as it is, on its own device and in its own dtype. A layer of N inputs takes N²
    numbers of 8 bytes; those beyond ``memory`` are summed in files that the system may page out.

    Args:
        module: any torch module; it is not changed.
        batches: each a tensor, a tuple of positional or a mapping of keyword arguments.
        path: the statistics file to write; both weight backends and ``convert_to_int8`` read it.
        layers: names of the layers to watch, without ``.weight``; all linear ones if not given.
        gram: keep Gram matrices. Without them the file serves for activation scales only.
        even: let no token count for more than the median one; for rounding by GPTQ only, as means and
            greatest values are of the shortened vectors too.
        memory: bytes of Gram matrices held in memory.
        scratch: folder for those beyond it; beside ``path`` if not given.
        forward: calls the module on a batch, where that takes more than calling it.
        progress_callback: gets ``(percent, stage, message)``.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        ConfigurationError: a name in ``layers`` is no linear layer of the module.
        CalibrationError: there were no batches, or no layer was run.
        ValidationError: NaN or Inf among a layer's inputs.
        Cancelled: the progress callback raised; nothing is left behind.
    """
    watched = _watched(module, layers)
    progress = Progress(progress_callback, {"calibrate": 90, "publish": 10})
    progress.stage("calibrate", f"{len(watched)} layers")
    total = len(batches) if isinstance(batches, Sequence) else 0
    target = Path(path)
    with (
        StagedOutput(target, overwrite=overwrite) as output,
        tempfile.TemporaryDirectory(dir=scratch or output.scratch, prefix="gram-") as spill,
        disk_errors(f"collecting statistics for {target}"),
    ):
        sums = GramSums(gram, _Spilling(Path(spill), memory), even)
        count = 0
        with Watcher(watched, sums, experts_apart=True) as watcher, torch.no_grad():
            for batch in batches:
                (forward or run_batch)(module, batch)
                watcher.batch()
                count += 1
                progress.update(min(count, total), max(total, count), f"batch {count}")
        if not count:
            raise CalibrationError("there were no calibration batches")
        groups = sums.groups()
        if not groups:
            raise CalibrationError("no linear layer of the module was run on the calibration batches")
        if unseen := sorted(name for name in watched if not _was_seen(name, sums.seen())):
            log.warning("%d layers were never run: %s", len(unseen), ", ".join(unseen[:5]))
        progress.stage("publish", target.name)
        described = [_entry(group, gram) for group in groups]
        write_statistics(output.path, _results(groups, described), described)
        output.publish(
            envelope(
                backend="calibrate",
                format="statistics",
                source={"name": type(module).__name__, "sha256": {}},
                recipe={"gram": gram},
                packages=("torch", "safetensors"),
                report={"layers": {entry.layers[0]: entry.count for entry in described}, "batches": count},
            )
        )
    progress.complete(str(target))
    return target


def collect_blockwise(
    blocks: ModelBlocks,
    batches: Sequence[Mapping[str, Any]],
    folder: Path,
    progress: Progress,
    *,
    gram: bool = True,
) -> list[StatisticsEntry]:
    """Run a lazily loaded model block by block; put the statistics of each group of layers into ``folder``.

    Returns:
        what was put there; :func:`kept_statistics` reads it back.
    """
    described: list[StatisticsEntry] = []
    steps = len(blocks.units) * len(batches)
    done = 0

    def visit(unit: nn.Module, arrivals: Sequence[Arrival]) -> Iterator[Any]:
        nonlocal done
        name = blocks.names[unit]
        blocks.lazy.load(unit, name)
        sums = GramSums(gram)
        with Watcher(blocks.layers_in(unit), sums, experts_apart=True) as watcher:
            for arrival in arrivals:
                yield unit(*arrival.args, **arrival.kwargs)
                watcher.batch()
                done += 1
                progress.update(min(done, steps), steps, f"watching {name}")
        blocks.lazy.unload(unit)
        for group in sums.groups():
            layers = tuple(layer_name(key) for key in blocks.weights_of(group.layers))
            result = group.sums.result()
            tensors = {"mean": result.mean, "channel_max": result.channel_max}
            if result.gram is not None:
                tensors["gram"] = result.gram.float()
            save_file(tensors, folder / f"{len(described)}.statistics")
            described.append(StatisticsEntry(layers, len(result.mean), result.count, gram))

    blocks.run(batches, visit)
    if not described:
        raise CalibrationError("no linear layer of the model was run on the calibration text")
    return described


def kept_statistics(
    described: Sequence[StatisticsEntry], folder: Path
) -> Iterator[tuple[StatisticsEntry, InputStatistics]]:
    """Read back what :func:`collect_blockwise` put into ``folder``, entry by entry."""
    for number, entry in enumerate(described):
        tensors = load_file(folder / f"{number}.statistics")
        gram = tensors.get("gram")
        yield entry, InputStatistics(gram, tensors["mean"], tensors["channel_max"], entry.count)


def run_batch(module: nn.Module, batch: Any) -> Any:
    """Call a module on a tensor, on a tuple of positional or on a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, tuple | list) else module(batch)


def _watched(module: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    found = {name: each for name, each in module.named_modules() if is_linear(each) or is_fused_experts(each)}
    if layers is None:
        return found
    if unknown := [name for name in layers if name not in found]:
        raise ConfigurationError(
            f"{unknown[0]!r} is no linear layer of the module", hint=f"it has {', '.join(list(found)[:5])} …"
        )
    return {name: found[name] for name in layers}


def _was_seen(name: str, seen: Collection[LayerId]) -> bool:
    return any(parameter.rpartition(".")[0] == name for parameter, _ in seen)


def _entry(group: InputGroup, gram: bool) -> StatisticsEntry:
    names = tuple(_layer(*layer) for layer in group.layers)
    return StatisticsEntry(names, group.sums.columns, group.sums.count, gram)


def _layer(parameter: str, expert: int | None) -> str:
    name = parameter.removesuffix(".weight")
    return name if expert is None else f"{name}.{expert}"


def _results(
    groups: Sequence[InputGroup], described: Sequence[StatisticsEntry]
) -> Iterator[tuple[StatisticsEntry, InputStatistics]]:
    for group, entry in zip(groups, described, strict=True):
        yield entry, group.sums.result()


class _Spilling:
    """Makes the buffers of Gram matrices: in memory up to a limit, then in mapped files."""

    def __init__(self, folder: Path, memory: int) -> None:
        self._folder, self._left, self._files = folder, memory, 0

    def __call__(self, columns: int) -> torch.Tensor:
        size = 8 * columns * columns
        if size <= self._left:
            self._left -= size
            return torch.zeros(columns, columns, dtype=torch.float64)
        self._files += 1
        path = self._folder / f"{self._files}.gram"
        with path.open("wb") as file:
            file.truncate(size)
        mapped = torch.from_file(str(path), shared=True, size=columns * columns, dtype=torch.float64)
        return mapped.reshape(columns, columns)
