"""Quantizing a model block by block on what its layers really see.

Each block is loaded and its layers are quantized in the order in which they run, each before its
output is computed, so that later layers see, and can make up for, the errors of earlier ones. Blocks
that choose which tokens a layer sees (experts) are run twice: watched as they are, then quantized.
Memory holds one block and the batches' hidden states.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from qwodel.algorithms.data_aware import DataAware, RoundedWeight, RoundingReport, round_together
from qwodel.algorithms.gram import InputStatistics
from qwodel.checkpoint.formats.codec import Codec
from qwodel.checkpoint.rounding.code_store import CodeStore
from qwodel.exceptions import QuantizationError
from qwodel.modeling.lazy_model import LazyModel
from qwodel.modeling.model_blocks import ModelBlocks, layer_name
from qwodel.modeling.observe.gram import GramSums, KeptInputs
from qwodel.modeling.observe.layers import first_input
from qwodel.modeling.observe.watcher import Watcher
from qwodel.modeling.stages import Stage, copied, find_stages, token_counts
from qwodel.modeling.stepwise import Arrival, run_in_step
from qwodel.progress import Progress

__all__ = ["Solver", "quantize_blockwise", "round_stored"]

log = logging.getLogger(__name__)


Solver = Callable[[Sequence[torch.Tensor], Codec, InputStatistics | None], Sequence[RoundedWeight]]
"""Rounds weights that read the same inputs and have the same task; without statistics, without data."""


def quantize_blockwise(
    lazy: LazyModel,
    tasks: Mapping[str, Codec],
    batches: Sequence[Mapping[str, torch.Tensor]],
    solve: Solver,
    store: CodeStore,
    progress: Progress,
    *,
    even: bool = False,
    asymmetric: bool = False,
) -> dict[str, RoundingReport]:
    """Find the codes of every weight in ``tasks``.

    Args:
        lazy: the model.
        tasks: checkpoint weight (without ``.weight`` where it ends so) → what it becomes.
        batches: keyword arguments of the model's forward pass.
        solve: rounds weights.
        store: keeps the codes.
        progress: its stage ``calibrate`` gets batches done.
        even: see :class:`~qwodel.modeling.observe.gram.GramSums`.
        asymmetric: run every batch through the unquantized model too, so that statistics tell how far
            inputs have drifted from its own. Takes twice the time and memory of batches.

    Returns:
        For every weight how its codes were found. Those whose layers saw nothing are rounded
        without data.

    Raises:
        ValidationError: NaN or Inf among weights or inputs.
        Cancelled: the progress callback raised.
    """
    return _Run(lazy, tasks, batches, solve, store, progress, even, asymmetric).run()


def round_stored(
    weights: Sequence[torch.Tensor],
    task: Codec,
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
    tasks: Mapping[str, Codec]
    batches: Sequence[Mapping[str, torch.Tensor]]
    solve: Solver
    store: CodeStore
    progress: Progress
    even: bool
    asymmetric: bool
    blocks: ModelBlocks = field(init=False)
    reports: dict[str, RoundingReport] = field(default_factory=dict)
    blocks_done: float = 0.0

    def __post_init__(self) -> None:
        self.blocks = ModelBlocks.of(self.lazy, self.tasks)

    def run(self) -> dict[str, RoundingReport]:
        units = len(self.blocks.units)
        log.info(
            "%d layers in %d blocks are quantized on %d batches", len(self.tasks), units, len(self.batches)
        )
        self.progress.stage("calibrate", f"{units} blocks")
        # Those of the unquantized model come first at every stop, while its weights are there.
        self.blocks.run([*self.batches, *self.batches] if self.asymmetric else self.batches, self._visit)
        self._round_unseen()
        return self.reports

    def _visit(self, unit: nn.Module, arrivals: Sequence[Arrival]) -> Iterator[Any]:
        name = self.blocks.names[unit]
        self.lazy.load(unit, name)
        layers = self.blocks.layers_in(unit)
        stages = find_stages(unit, layers, arrivals[-1])
        if stages is None:
            yield from self._twice(unit, layers, arrivals)
        else:
            yield from self._in_stages(unit, layers, stages, arrivals)
        self.lazy.unload(unit)

    def _twice(
        self, unit: nn.Module, layers: Mapping[str, nn.Module], arrivals: Sequence[Arrival]
    ) -> Iterator[Any]:
        """Run a block to see what its layers read, quantize it, and run it again."""
        name = self.blocks.names[unit]
        sources, ours = self._parted(arrivals)
        sums = GramSums(even=self.even)
        for source, arrival in zip_longest(sources, ours):
            output = None
            if source is not None:
                kept = KeptInputs(token_counts(source))
                with Watcher(layers, kept):
                    output = unit(*source.args, **source.kwargs)
                sums.sources = kept.inputs
            with Watcher(layers, sums, experts_apart=True):
                unit(*copied(arrival.args), **copied(arrival.kwargs))
            self._step(0.5 / len(ours), f"watching {name}")
            if source is not None:
                yield output
        replaced: dict[str, torch.Tensor] = {}
        for group in sums.groups():
            replaced |= self._solve(self.blocks.weights_of(group.layers), group.sums.result())
        self.lazy.load(unit, name, replaced)
        replaced.clear()
        for arrival in ours:
            yield unit(*arrival.args, **arrival.kwargs)
            self._step(0.5 / len(ours), f"quantized {name}")

    def _in_stages(
        self,
        unit: nn.Module,
        layers: Mapping[str, nn.Module],
        stages: Sequence[Stage],
        arrivals: Sequence[Arrival],
    ) -> Iterator[Any]:
        """Run a block once, all batches in step, each stage quantized before it is run."""
        outputs: dict[int, Any] = {}
        led = {layers[stage[0]]: stage for stage in stages}

        def forward(number: int) -> None:
            arrival = arrivals[number]
            outputs[number] = unit(*arrival.args, **arrival.kwargs)

        def quantize_and_run(layer: nn.Module, waiting: Sequence[Arrival]) -> Iterator[Any]:
            sources, ours = self._parted(waiting)
            share = 0.5 / len(stages) / len(ours)
            stage = led.pop(layer, None)  # None where it is called once more
            replaced = {} if stage is None else self._quantize_stage(stage, sources, ours, share)
            # The layer's own hooks have run before it stopped.
            for each in sources:
                yield layer.forward(*each.args, **each.kwargs)
            for name in stage or ():
                self.lazy.load(layers[name], name, replaced)
            for each in ours:
                yield layer.forward(*each.args, **each.kwargs)
                if stage is not None:
                    self._step(share, f"quantized {stage[0]}")

        run_in_step(forward, range(len(arrivals)), list(led), quantize_and_run, finish=True)
        for number in range(len(arrivals)):
            yield outputs.pop(number)

    def _quantize_stage(
        self, stage: Stage, sources: Sequence[Arrival], ours: Sequence[Arrival], share: float
    ) -> dict[str, torch.Tensor]:
        sums = GramSums(even=self.even)
        first = (f"{stage[0]}.weight", None)
        for source, each in zip_longest(sources, ours):
            if source is not None:
                sums.sources[first] = first_input(source.args, source.kwargs)
            sums.add(first, first_input(each.args, each.kwargs))
            sums.forget()
            self._step(share, f"watching {stage[0]}")
        [group] = sums.groups()
        keys = self.blocks.weights_of([(f"{name}.weight", None) for name in stage])
        return self._solve(keys, group.sums.result())

    def _parted(self, arrivals: Sequence[Arrival]) -> tuple[Sequence[Arrival], Sequence[Arrival]]:
        """Those that run through the unquantized model, and those that run through the quantized one."""
        count = len(arrivals) // 2 if self.asymmetric else 0
        return arrivals[:count], arrivals[count:]

    def _solve(self, keys: Sequence[str], statistics: InputStatistics | None) -> dict[str, torch.Tensor]:
        """Round weights that read the same inputs; return what their codes stand for."""
        pending = [key for key in keys if layer_name(key) not in self.reports]
        weights = {key: self.lazy.read(key) for key in pending}
        # A block that the model runs again is quantized once.
        replaced = {key: self._kept(key) for key in keys if key not in weights}
        for task in dict.fromkeys(self.tasks[layer_name(key)] for key in pending):
            group = [key for key in pending if self.tasks[layer_name(key)] == task]
            try:
                solutions = self.solve([weights[key] for key in group], task, statistics)
            except QuantizationError as error:
                raise error.within(group[0]) from error
            self.store.add({layer_name(key): each.codes for key, each in zip(group, solutions, strict=True)})
            for key, solution in zip(group, solutions, strict=True):
                self.reports[layer_name(key)] = solution.report
                replaced[key] = solution.weight
        return replaced

    def _kept(self, key: str) -> torch.Tensor:
        """What the codes found before stand for."""
        layer = layer_name(key)
        weight = self.store.get(layer).dequantize()
        basis = self.tasks[layer].basis(tuple(weight.shape))
        return weight if basis is None else basis.restore(weight)

    def _round_unseen(self) -> None:
        unseen = [
            key for keys in self.blocks.keys.values() for key in keys if layer_name(key) not in self.reports
        ]
        for key in unseen:
            self._solve([key], None)
        known = {layer_name(key) for keys in self.blocks.keys.values() for key in keys}
        if missing := sorted(set(self.tasks) - known):
            raise QuantizationError(
                f"{len(missing)} weights belong to no layer of the model that runs: {', '.join(missing[:3])}",
                hint="leave them out with exclude_layers, or quantize without calibration data",
            )
        if unseen:
            log.warning(
                "%d layers saw no calibration data and are rounded without: %s", len(unseen), unseen[0]
            )

    def _step(self, blocks: float, message: str) -> None:
        self.blocks_done += blocks
        steps = 2 * len(self.blocks.units) * len(self.batches)
        done = round(2 * len(self.batches) * self.blocks_done)
        self.progress.update(min(done, steps), steps, message)
