"""quantize: a model's linear layers and convolutions replaced by quantized ones, in the order they run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qwodel.exceptions import ValidationError
from qwodel.modeling.patterns import Patterns, find_patterns
from qwodel.modeling.stepwise import Arrival, run_in_step
from qwodel.segquant.batches import Call, calls_of, run_call
from qwodel.segquant.config import Configuration
from qwodel.segquant.fold import fold_smoothing, norm_readers
from qwodel.segquant.layer import (
    Smoothing,
    is_target,
    quantize_layer,
    sample_limit,
    sampled_rows,
    settle_together,
)
from qwodel.segquant.observe import LayerInputs, RowSampler
from qwodel.segquant.seams import Seams
from qwodel.segquant.settings import Optimum

__all__ = ["LayerReport", "QuantizationReport", "quantize", "quantize_model"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer.

    Attributes:
        error: ‖ŷ − y‖² / ‖y‖² on held-out rows.
        how: what was chosen.
    """

    name: str
    error: float
    how: str

    @property
    def sqnr(self) -> float:
        """The error in dB."""
        return -10 * float(torch.tensor(max(self.error, 1e-30)).log10())


@dataclass
class QuantizationReport:
    """What became of a model.

    Attributes:
        layers: in the order they were quantized.
        kept: names of layers that stay as they were → why.
        folded: layers whose smoothing went into the layer before.
    """

    patterns: Patterns | None = None
    layers: list[LayerReport] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)

    def table(self) -> str:
        """A line a layer."""
        width = max((len(each.name) for each in self.layers), default=5)
        lines = [f"{each.name:{width}}  {each.sqnr:6.2f} dB  {each.how}" for each in self.layers]
        return "\n".join([*lines, *(f"{name:{width}}  kept: {why}" for name, why in self.kept.items())])


def quantize(
    model: nn.Module,
    calib_data_loader: Iterable[Any],
    config: Mapping[str, Any] | None = None,
    per_layer_mode: bool = False,
    verbose: bool = False,
    example: Any = None,
    *,
    inplace: bool = True,
) -> nn.Module:
    """Quantize a model's linear layers (and convolutions, where asked for) along the seams of its graph.

    Each layer is calibrated on what the quantized layers before it give. Nothing but the model is
    changed: calibration data stays as it is.

    Args:
        model: any module.
        calib_data_loader: batches; see :func:`~qwodel.segquant.batches.calls_of`.
        config: settings by layer name; :data:`~qwodel.segquant.default_quantize_config` where ``None``.
        per_layer_mode: hold the inputs of one layer at a time and run the model once for each; else
            all batches pass through the model together, once.
        verbose: print the seams that were found, and a line a layer.
        example: inputs the model is traced with; the first batch where ``None``.
        inplace: change ``model``; else a copy.

    Returns:
        the model that was changed.

    Raises:
        ConfigurationError: a setting is unknown or cannot be.
        CalibrationError: there is no calibration data, or NaN or Inf in a layer's inputs.
        ValidationError: the model does not run on the data, or nothing in it can be quantized.
    """
    target = model if inplace else deepcopy(model)
    report = quantize_model(target, calib_data_loader, config, per_layer_mode=per_layer_mode, example=example)
    if verbose:
        if report.patterns is not None:
            print(report.patterns.table())
        print(report.table())
    return target


def quantize_model(
    model: nn.Module,
    batches: Iterable[Any],
    config: Mapping[str, Any] | Configuration | None = None,
    *,
    per_layer_mode: bool = False,
    example: Any = None,
    on_layer: Callable[[int, int, str], None] | None = None,
) -> QuantizationReport:
    """:func:`quantize` in place, with a report of what became of each layer.

    Args:
        on_layer: called after each layer with how many are done, how many there are, and its name.
    """
    settings = config if isinstance(config, Configuration) else Configuration(config)
    calls = calls_of(batches)
    call = calls[0] if example is None else calls_of([example])[0]
    report = QuantizationReport()
    layers = _targets(model, settings, report)
    with _evaluating(model), torch.no_grad():
        counts = _count_calls(model, layers, call)
        report.kept |= {name: "the model does not call it" for name in layers if name not in counts}
        layers = {name: layers[name] for name in counts}
        if not layers:
            raise ValidationError(
                "nothing is quantized: no linear layer that the model calls is enabled",
                hint="see the patterns of the configuration",
            )
        report.patterns = _seams(model, call, settings)
        work = _Work(
            model,
            layers,
            settings,
            Seams.of(report.patterns),
            report,
            _groups(model, call, layers, settings),
            on_layer,
        )
        if per_layer_mode:
            _one_by_one(work, calls)
        else:
            _all_in_step(work, calls, [name for name, count in counts.items() if count > 1])
        if any(settings.of(name).opt.type is not Optimum.DEFAULT for name in layers):
            report.folded = fold_smoothing(model, call)
    return report


@dataclass
class _Work:
    model: nn.Module
    layers: dict[str, nn.Module]
    settings: Configuration
    seams: Seams
    report: QuantizationReport
    groups: dict[str, tuple[str, ...]]
    """Layer → all layers that read the same norm as it."""
    on_layer: Callable[[int, int, str], None] | None = None
    smoothings: dict[tuple[str, ...], Smoothing] = field(default_factory=dict)

    def solve(self, name: str, inputs: LayerInputs) -> nn.Module:
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


def _targets(model: nn.Module, settings: Configuration, report: QuantizationReport) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        why = is_target(module, settings.of(name))
        if why is None:
            layers[name] = module
        else:
            report.kept[name] = why
    if "" in layers:
        raise ValidationError(
            "the model is a single layer, which cannot be replaced in itself", hint="wrap it in nn.Sequential"
        )
    return layers


def _count_calls(model: nn.Module, layers: Mapping[str, nn.Module], call: Call) -> dict[str, int]:
    """Name → calls in one run, in the order of the first."""
    counts: dict[str, int] = {}

    def counting(name: str) -> Any:
        def hook(*_: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return hook

    hooks = [layer.register_forward_hook(counting(name)) for name, layer in layers.items()]
    try:
        run_call(model, call)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ValidationError(
            f"{type(model).__name__} does not run on the calibration data: {error}",
            hint="a batch is a tuple of positional arguments, a dictionary of keywords, or (args, kwargs)",
        ) from error
    finally:
        for each in hooks:
            each.remove()
    return counts


def _groups(
    model: nn.Module, call: Call, layers: Mapping[str, nn.Module], settings: Configuration
) -> dict[str, tuple[str, ...]]:
    """Layers that read one norm and can share a smoothing that the norm takes."""
    found: dict[str, tuple[str, ...]] = {}
    for names in norm_readers(model, call).values():
        group = tuple(names)
        alike = len({settings.of(name).model_dump_json() for name in group}) == 1
        linear = all(isinstance(layers.get(name), nn.Linear) for name in group)
        smoothed = settings.of(group[0]).opt.type is not Optimum.DEFAULT
        if len(group) > 1 and alike and linear and smoothed:
            found |= dict.fromkeys(group, group)
    return found


def _seams(model: nn.Module, call: Call, settings: Configuration) -> Patterns | None:
    wanted = settings.default.search_patterns
    if not wanted or not any(each.seglinear for each in settings.all()):
        return None
    return find_patterns(model, call, wanted)


def _all_in_step(work: _Work, calls: Sequence[Call], repeated: Sequence[str]) -> None:
    names = {layer: name for name, layer in work.layers.items()}
    made: dict[nn.Module, nn.Module] = {}
    if repeated:
        # Their inputs come at several times, and all of them count.
        for name, inputs in _record(work, repeated, calls).items():
            made[work.layers[name]] = work.solve(name, inputs)

    def visit(unit: nn.Module, arrivals: Sequence[Arrival]) -> Iterator[Any]:
        if unit not in made:
            name = names[unit]
            sampler = work.sampler(name, len(arrivals))
            for each in arrivals:
                sampler.add(sampled_rows(unit, _input_of(each)))
            made[unit] = work.solve(name, sampler.result())
        for each in arrivals:
            yield made[unit](*each.args, **each.kwargs)

    run_in_step(lambda call: run_call(work.model, call), calls, list(work.layers.values()), visit)
    for layer, replacement in made.items():
        work.install(names[layer], replacement)


def _one_by_one(work: _Work, calls: Sequence[Call]) -> None:
    made: dict[str, nn.Module] = {}
    try:
        for name in work.layers:
            made[name] = work.solve(name, _record(work, [name], calls)[name])
            work.install(name, made[name])
    except BaseException:
        for name, module in made.items():
            work.restore(name, module)
        raise


def _record(work: _Work, names: Sequence[str], calls: Sequence[Call]) -> dict[str, LayerInputs]:
    """Run all batches, and keep a sample of what some layers read."""
    samplers = {name: work.sampler(name, len(calls)) for name in names}

    def watch(sampler: RowSampler) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sampler.add(sampled_rows(layer, _input_of(Arrival(layer, args, kwargs))))

        return hook

    hooks = [
        work.layers[name].register_forward_pre_hook(watch(sampler), with_kwargs=True)
        for name, sampler in samplers.items()
    ]
    try:
        for call in calls:
            run_call(work.model, call)
    finally:
        for each in hooks:
            each.remove()
    return {name: sampler.result() for name, sampler in samplers.items()}


def _input_of(arrival: Arrival) -> torch.Tensor:
    value = arrival.args[0] if arrival.args else next(iter(arrival.kwargs.values()), None)
    if not isinstance(value, torch.Tensor):
        raise ValidationError(f"{type(arrival.unit).__name__} is called with a {type(value).__name__}")
    return value


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = training.get(module, model.training)
