"""quantize: a model's linear layers and convolutions replaced by quantized ones, in the order they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from qwodel.display import shown
from qwodel.exceptions import ValidationError
from qwodel.modeling.patterns import Patterns, find_patterns
from qwodel.segquant.batches import Call, calls_of, run_call
from qwodel.segquant.config import Configuration
from qwodel.segquant.fold import fold_smoothing, norm_readers
from qwodel.segquant.layer import is_target
from qwodel.segquant.report import QuantizationReport
from qwodel.segquant.seams import Seams
from qwodel.segquant.sequential import SequentialRun, all_in_step, one_by_one
from qwodel.segquant.settings import Optimum

__all__ = ["quantize", "quantize_model"]


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
            print(*map(shown, report.patterns.table().splitlines()), sep="\n")
        print(*map(shown, report.table().splitlines()), sep="\n")
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
        groups = _groups(model, call, layers, settings)
        run = SequentialRun(model, layers, settings, Seams.of(report.patterns), report, groups, on_layer)
        if per_layer_mode:
            one_by_one(run, calls)
        else:
            all_in_step(run, calls, [name for name, count in counts.items() if count > 1])
        if any(settings.of(name).opt.type is not Optimum.DEFAULT for name in layers):
            report.folded = fold_smoothing(model, call)
    return report


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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = training.get(module, model.training)
