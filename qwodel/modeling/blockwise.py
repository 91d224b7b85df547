"""Quantizing a model block by block on what its layers really see.

Each block is loaded, run on the calibration batches while the inputs of its layers are summed up,
quantized, and run again with its quantized weights, so that later blocks see, and can make up for,
the errors of earlier ones. Memory holds one block and the batches' hidden states.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qwodel.algorithms.data_aware import DataAware, RoundedWeight, RoundingReport, round_together
from qwodel.algorithms.gram import InputStatistics
from qwodel.checkpoint.code_store import CodeStore
from qwodel.checkpoint.storage_format import StorageFormat
from qwodel.exceptions import QuantizationError
from qwodel.modeling.lazy_model import LazyModel
from qwodel.modeling.recorder import InputRecorder, LayerId, layers_to_record
from qwodel.modeling.stepwise import Arrival, run_in_step
from qwodel.progress import Progress

__all__ = ["Solver", "quantize_blockwise", "round_stored"]

log = logging.getLogger(__name__)


Solver = Callable[[Sequence[torch.Tensor], StorageFormat, InputStatistics | None], Sequence[RoundedWeight]]
"""Rounds weights that read the same inputs and have the same task; without statistics, without data."""


def quantize_blockwise(
    lazy: LazyModel,
    tasks: Mapping[str, StorageFormat],
    batches: Sequence[Mapping[str, torch.Tensor]],
    solve: Solver,
    store: CodeStore,
    progress: Progress,
) -> dict[str, RoundingReport]:
    """Find the codes of every weight in ``tasks``.

    Args:
        lazy: the model.
        tasks: checkpoint weight (without ``.weight`` where it ends so) → what it becomes.
        batches: keyword arguments of the model's forward pass.
        solve: rounds weights.
        store: keeps the codes.
        progress: its stage ``calibrate`` gets batches done.

    Returns:
        For every weight how its codes were found. Those whose layers saw nothing are rounded
        without data.

    Raises:
        ValidationError: NaN or Inf among weights or inputs.
        Cancelled: the progress callback raised.
    """
    return _Run(lazy, tasks, batches, solve, store, progress).run()


def round_stored(
    weights: Sequence[torch.Tensor],
    task: StorageFormat,
    statistics: InputStatistics | None,
    options: DataAware,
) -> list[RoundedWeight]:
    """:func:`~qwodel.algorithms.data_aware.round_together` in the basis of a storage format."""
    assert task.quant_type is not None
    bases = [task.basis(tuple(weight.shape)) for weight in weights]
    known = [basis for basis in bases if basis is not None]
    return round_together(
        weights, task.quant_type, task.granularity, statistics, options, bases=known or None
    )


@dataclass(slots=True)
class _Run:
    lazy: LazyModel
    tasks: Mapping[str, StorageFormat]
    batches: Sequence[Mapping[str, torch.Tensor]]
    solve: Solver
    store: CodeStore
    progress: Progress
    reports: dict[str, RoundingReport] = field(default_factory=dict)
    names: dict[nn.Module, str] = field(default_factory=dict)
    keys: dict[LayerId, list[str]] = field(default_factory=dict)
    steps_done: int = 0
    steps: int = 1

    def run(self) -> dict[str, RoundingReport]:
        model = self.lazy.model
        self.names = {module: name for name, module in model.named_modules()}
        parameters = self._locate()
        recorded = layers_to_record(model, parameters)
        units = find_units(model, list(recorded.values()))
        log.info(
            "%d layers in %d blocks are quantized on %d batches",
            len(self.tasks),
            len(units),
            len(self.batches),
        )
        self.progress.stage("calibrate", f"{len(units)} blocks")
        self.steps = max(1, 2 * len(units) * len(self.batches))
        _load_outside(self.lazy, model, "", frozenset(units))
        model.tie_weights()
        with torch.no_grad():
            run_in_step(lambda batch: model(**batch), self.batches, units, self._visit)
        self._round_unseen()
        return self.reports

    def _locate(self) -> set[str]:
        """Note which checkpoint weights each layer consists of; return the parameters concerned."""
        found = set()
        for name, _ in self.lazy.model.named_parameters(remove_duplicate=False):
            for part in self.lazy.parts(name):
                if layer_name(part.key) in self.tasks:
                    expert = part.index if part.pattern and "*" in part.pattern else None
                    self.keys.setdefault((name, expert), []).append(part.key)
                    found.add(name)
        return found

    def _visit(self, unit: nn.Module, arrivals: Sequence[Arrival]) -> Iterator[Any]:
        name = self.names[unit]
        self.lazy.load(unit, name)
        layers = layers_to_record(unit, {key[0].removeprefix(f"{name}.") for key in self.keys})
        layers = {f"{name}.{inner}" if inner else name: module for inner, module in layers.items()}
        with InputRecorder(layers) as recorder:
            for arrival in arrivals:
                unit(*_copied(arrival.args), **_copied(arrival.kwargs))
                recorder.end_pass()
                self._step(f"watching {name}")
        replaced: dict[str, torch.Tensor] = {}
        for group in recorder.groups():
            keys = [key for layer in group.layers for key in self.keys.get(layer, ())]
            replaced |= self._solve(keys, group.sums.result())
        self.lazy.load(unit, name, replaced)
        replaced.clear()
        for arrival in arrivals:
            yield unit(*arrival.args, **arrival.kwargs)
            self._step(f"quantized {name}")
        self.lazy.unload(unit)

    def _solve(self, keys: Sequence[str], statistics: InputStatistics | None) -> dict[str, torch.Tensor]:
        """Round weights that read the same inputs; return what their codes stand for."""
        pending = [key for key in keys if layer_name(key) not in self.reports]
        weights = {key: self.lazy.read(key) for key in pending}
        replaced = {}
        for task in dict.fromkeys(self.tasks[layer_name(key)] for key in pending):
            group = [key for key in pending if self.tasks[layer_name(key)] == task]
            try:
                solutions = self.solve([weights[key] for key in group], task, statistics)
            except QuantizationError as error:
                raise type(error)(f"{group[0]}: {error}", hint=error.hint) from error
            self.store.add({layer_name(key): each.codes for key, each in zip(group, solutions, strict=True)})
            for key, solution in zip(group, solutions, strict=True):
                self.reports[layer_name(key)] = solution.report
                replaced[key] = solution.weight
        return replaced

    def _round_unseen(self) -> None:
        unseen = [key for keys in self.keys.values() for key in keys if layer_name(key) not in self.reports]
        for key in unseen:
            self._solve([key], None)
        known = {layer_name(key) for keys in self.keys.values() for key in keys}
        if missing := sorted(set(self.tasks) - known):
            raise QuantizationError(
                f"{len(missing)} weights belong to no layer of the model that runs: {', '.join(missing[:3])}",
                hint="leave them out with exclude_layers, or quantize without calibration data",
            )
        if unseen:
            log.warning(
                "%d layers saw no calibration data and are rounded without: %s", len(unseen), unseen[0]
            )

    def _step(self, message: str) -> None:
        self.steps_done += 1
        self.progress.update(min(self.steps_done, self.steps), self.steps, message)


def layer_name(key: str) -> str:
    """A checkpoint weight's layer: its name without ``.weight``."""
    return key.removesuffix(".weight")


def find_units(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules to stop at: elements of the outermost module lists that hold one of ``layers``.

    Layers outside any list, such as a head, are units of their own.
    """
    wanted = set(layers)

    def search(module: nn.Module) -> Iterator[nn.Module]:
        if module in wanted:
            yield module
            return
        for child in module.children():
            # A list inside a list is never called itself.
            if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
                if wanted.intersection(child.modules()):
                    yield child
            else:
                yield from search(child)

    return list(dict.fromkeys(search(model)))


def _load_outside(lazy: LazyModel, module: nn.Module, name: str, units: frozenset[nn.Module]) -> None:
    """Load everything that lies in no unit and may be needed before the last one."""
    head = lazy.model.get_output_embeddings() if hasattr(lazy.model, "get_output_embeddings") else None
    for inner, child in module.named_children():
        full = f"{name}.{inner}" if name else inner
        if child in units or child is head:
            continue
        if units.intersection(child.modules()):
            _load_outside(lazy, child, full, units)
        else:
            lazy.load(child, full)
    lazy.load_own(module, name)


def _copied(value: Any) -> Any:
    """Arguments for a trial run: a block that changes its input in place changes a copy."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_copied(each) for each in value)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return value
