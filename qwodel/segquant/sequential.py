"""Layers solved in the order they run, each on what the quantized layers before it give."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qwodel.modeling.observe.layers import first_input
from qwodel.modeling.observe.rows import LayerInputs, RowSampler, RowSamples
from qwodel.modeling.observe.watcher import Watcher
from qwodel.modeling.stepwise import Arrival, run_in_step
from qwodel.segquant.batches import Call, run_call
from qwodel.segquant.config import Configuration
from qwodel.segquant.layer import Smoothing, quantize_layer, sample_limit, sampled_rows, settle_together
from qwodel.segquant.report import LayerReport, QuantizationReport
from qwodel.segquant.seams import Seams

__all__ = ["SequentialRun", "all_in_step", "one_by_one"]

_log = logging.getLogger(__name__)


@dataclass
class SequentialRun:
    """What solving a model's layers takes, and what has come of it.

    Attributes:
        layers: those to solve, by name, in the order the model calls them.
        groups: layer → all layers that read the same norm as it.
        on_layer: called after each layer with how many are done, how many there are, and its name.
        smoothings: of the groups that were met.
    """

    model: nn.Module
    layers: dict[str, nn.Module]
    settings: Configuration
    seams: Seams
    report: QuantizationReport
    groups: dict[str, tuple[str, ...]]
    on_layer: Callable[[int, int, str], None] | None = None
    smoothings: dict[tuple[str, ...], Smoothing] = field(default_factory=dict)

    def solve(self, name: str, inputs: LayerInputs) -> nn.Module:
        """The quantized layer, reported."""
        settings = self.settings.of(name)
        group = self.groups.get(name)
        if group is not None and group not in self.smoothings:
            together = [self.layers[each] for each in group]
            self.smoothings[group] = settle_together(together, inputs, settings)
        shared = None if group is None else self.smoothings[group]
        made, choice = quantize_layer(name, self.layers[name], inputs, settings, self.seams, shared)
        self.report.layers.append(LayerReport(name, choice.error, choice.how))
        if settings.opt.verbose or settings.calib.verbose:
            tried = ", ".join(f"{how} {error:.3g}" for how, error in choice.tried.items())
            _log.info("%s: %s (relative errors: %s)", name, choice.how, tried)
        if self.on_layer is not None:
            self.on_layer(len(self.report.layers), len(self.layers), name)
        return made

    def sampler(self, name: str, batches: int) -> RowSampler:
        """What samples the inputs of a layer over so many batches."""
        return RowSampler(name, batches, sample_limit(self.layers[name]))

    def install(self, name: str, made: nn.Module) -> None:
        """Put a layer wherever the model holds the one it replaces."""
        self._exchange(self.layers[name], made)

    def restore(self, name: str, made: nn.Module) -> None:
        """Undo :meth:`install`."""
        self._exchange(made, self.layers[name])

    def _exchange(self, old: nn.Module, new: nn.Module) -> None:
        for parent in list(self.model.modules()):
            for child, module in list(parent.named_children()):
                if module is old:
                    setattr(parent, child, new)


def all_in_step(run: SequentialRun, calls: Sequence[Call], repeated: Sequence[str]) -> None:
    """Solve each layer when all batches have come to it, and let them go on through the solved one.

    Args:
        repeated: layers that a run calls more than once; they are solved first, on what the unquantized model gives.
    """
    names = {layer: name for name, layer in run.layers.items()}
    made: dict[nn.Module, nn.Module] = {}
    if repeated:
        # Their inputs come at several times, and all of them count.
        for name, inputs in _record(run, repeated, calls).items():
            made[run.layers[name]] = run.solve(name, inputs)

    def visit(unit: nn.Module, arrivals: Sequence[Arrival]) -> Iterator[Any]:
        if unit not in made:
            name = names[unit]
            sampler = run.sampler(name, len(arrivals))
            for each in arrivals:
                sampler.add(sampled_rows(unit, first_input(each.args, each.kwargs, name)))
            made[unit] = run.solve(name, sampler.result())
        for each in arrivals:
            yield made[unit](*each.args, **each.kwargs)

    run_in_step(lambda call: run_call(run.model, call), calls, list(run.layers.values()), visit)
    for layer, replacement in made.items():
        run.install(names[layer], replacement)


def one_by_one(run: SequentialRun, calls: Sequence[Call]) -> None:
    """Run the model once for each layer, and hold the inputs of that layer alone."""
    made: dict[str, nn.Module] = {}
    try:
        for name in run.layers:
            made[name] = run.solve(name, _record(run, [name], calls)[name])
            run.install(name, made[name])
    except BaseException:
        for name, module in made.items():
            run.restore(name, module)
        raise


def _record(run: SequentialRun, names: Sequence[str], calls: Sequence[Call]) -> dict[str, LayerInputs]:
    """Run all batches, and keep a sample of what some layers read."""
    samples = RowSamples({name: run.sampler(name, len(calls)) for name in names}, sampled_rows)
    with Watcher({name: run.layers[name] for name in names}, samples):
        for call in calls:
            run_call(run.model, call)
    return samples.result()
