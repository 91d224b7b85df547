"""find_patterns: trace, then look for seams."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qwodel.exceptions import ValidationError
from qwodel.modeling.patterns.exporting import exported_graph
from qwodel.modeling.patterns.findings import Finding, Patterns, SegPattern
from qwodel.modeling.patterns.operations import Graph
from qwodel.modeling.patterns.recording import fx_graph, run_graph
from qwodel.modeling.patterns.seams import input_findings, output_findings
from qwodel.process_state import TRACING

__all__ = ["Example", "find_patterns"]

Example = tuple[Any, ...] | Mapping[str, Any] | torch.Tensor
"""Positional arguments, keyword arguments, or ``(args, kwargs)``; a tensor alone is one argument."""

_METHODS = {"torch.export": exported_graph, "torch.fx": fx_graph, "hooks": run_graph}
_log = logging.getLogger(__name__)


def find_patterns(
    model: nn.Module, example: Example, patterns: Sequence[SegPattern] | None = None
) -> Patterns:
    """Return where the linear layers' outputs are cut, and their inputs joined or activated.

    The graph is that of ``torch.export``; of ``torch.fx`` for a model that cannot be exported, and of
    one recorded run otherwise. Neither the model nor the example is changed.

    Args:
        model: any module; it is traced as in evaluation.
        example: inputs that the model runs on.
        patterns: those to look for; all where ``None``.

    Raises:
        ValidationError: the model does not run on the example.
    """
    wanted = frozenset(SegPattern if patterns is None else patterns)
    graph, method = _graph(model, *_arguments(example))
    layers = [operation for operation in graph.operations if operation.layer is not None]
    findings: dict[Finding, None] = {}
    for operation in layers:
        if operation.name == "linear":
            findings.update(dict.fromkeys(output_findings(operation)))
            findings.update(dict.fromkeys(input_findings(operation)))
    kept = tuple(each for each in findings if each.pattern in wanted)
    return Patterns(kept, method, tuple(dict.fromkeys(str(each.layer) for each in layers)))


def _arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, torch.Tensor):
        return (example,), {}
    if len(example) == 2 and isinstance(example[0], tuple | list) and isinstance(example[1], Mapping):
        return tuple(example[0]), dict(example[1])
    return tuple(example), {}


def _graph(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Graph, str]:
    causes: list[Exception] = []
    for method, read in _METHODS.items():
        try:
            with TRACING, _evaluating(model), torch.no_grad():
                return read(model, args, kwargs), method
        except Exception as error:
            _log.info("%s cannot read %s: %s", method, type(model).__name__, str(error).partition("\n")[0])
            causes.append(error)
    raise ValidationError(
        f"{type(model).__name__} does not run on the example: {str(causes[-1]).partition(chr(10))[0]}",
        hint="give an example with which model(*args, **kwargs) runs",
    ) from causes[-1]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
