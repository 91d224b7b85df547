"""Smoothing moved into the layer before, where that leaves the function as it is.

Candidates come from one run with hooks and from names; each is proved on that run with all rounding
switched off, and taken back where the outputs change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from qwodel.modeling.norm_readers import find_norm_readers
from qwodel.modules.input_rounding import InputRounding
from qwodel.modules.segment_linear import SegmentLinear
from qwodel.segquant.batches import Call, run_call, tensors_of

__all__ = ["fold_smoothing", "is_affine_norm", "norm_readers"]

_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class _Fold:
    """Divides what ``producer`` gives by the smoothing of ``consumers``, which lose it."""

    consumers: tuple[str, ...]
    producer: nn.Module
    outputs: slice
    kind: str
    """Its names without numbers: alike in blocks that are alike."""

    def apply(self, model: nn.Module) -> Callable[[], None]:
        """Fold; return what undoes it."""
        products = [part for name in self.consumers for part in _linear(model, name).products()]
        smoothing = products[0].smoothing
        assert smoothing is not None
        state = {key: value.clone() for key, value in self.producer.state_dict().items()}
        kept = [part.smoothing for part in products]
        self._divide(smoothing)
        for part in products:
            part.smoothing = None

        def undo() -> None:
            self.producer.load_state_dict(state)
            for part, before in zip(products, kept, strict=True):
                part.smoothing = before

        return undo

    def _divide(self, smoothing: torch.Tensor) -> None:
        if isinstance(self.producer, SegmentLinear):
            factors = torch.ones(self.producer.out_features, dtype=torch.float64, device=smoothing.device)
            factors[self.outputs] /= smoothing.double()
            self.producer.scale_outputs(factors)
            return
        for parameter in self.producer.parameters(recurse=False):
            parameter.copy_((parameter.double() / smoothing.double()).to(parameter.dtype))


@torch.no_grad()
def fold_smoothing(model: nn.Module, call: Call) -> list[str]:
    """Fold what can be folded, in place; return the names of the layers that lost their smoothing."""
    readers = norm_readers(model, call)
    with _unrounded(model):
        exact = _outputs(model, call)
        folded: list[str] = []
        refused: set[str] = set()  # what fails in one block is not tried in all others
        for fold in (*_norm_folds(model, readers), *_linear_folds(model)):
            if fold.kind in refused or any(name in folded for name in fold.consumers):
                continue
            undo = fold.apply(model)
            found = _outputs(model, call)
            if float((found - exact).norm() / exact.norm().clamp_min(1e-30)) <= _TOLERANCE:
                folded += fold.consumers
            else:
                undo()
                refused.add(fold.kind)
    return folded


def is_affine_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with a weight for each channel, in fp32: 16-bit weights would round."""
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.casefold()
    return named and isinstance(weight, nn.Parameter) and weight.ndim == 1 and weight.dtype == torch.float32


@torch.no_grad()
def norm_readers(model: nn.Module, call: Call) -> dict[str, list[str]]:
    """Norm → the linear layers that read exactly what it gives."""
    readers, _ = find_norm_readers(
        model,
        lambda: run_call(model, call),
        is_norm=is_affine_norm,
        is_reader=lambda module: isinstance(module, nn.Linear | SegmentLinear),
    )
    return readers


def _norm_folds(model: nn.Module, readers: dict[str, list[str]]) -> Iterator[_Fold]:
    for norm, names in readers.items():
        if all(_foldable(model, name) for name in names):
            first = _linear(model, names[0]).products()[0].smoothing
            shared = (_linear(model, name).products()[0].smoothing for name in names)
            if first is not None and all(each is not None and torch.equal(each, first) for each in shared):
                yield _Fold(tuple(names), model.get_submodule(norm), slice(None), _kind(norm, *names))


def _linear_folds(model: nn.Module) -> Iterator[_Fold]:
    """Every quantized layer near a smoothed one whose outputs, or a part of them, fit its inputs."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SegmentLinear)}
    for name, layer in layers.items():
        if not _foldable(model, name):
            continue
        prefix = _surroundings(name)
        for other, producer in layers.items():
            if other == name or not other.startswith(prefix) or producer.out_features % layer.in_features:
                continue
            for start in range(0, producer.out_features, layer.in_features):
                part = slice(start, start + layer.in_features)
                yield _Fold((name,), producer, part, _kind(other, name, str(part)))


def _surroundings(name: str) -> str:
    """The module that a layer is part of, and a dot: of ``attn.to_out.0`` it is ``attn.``."""
    parts = name.split(".")
    levels = 2 if parts[-1].isdigit() else 1
    above = parts[:-levels]
    return ".".join([*above, ""]) if above else ""


def _kind(*names: str) -> str:
    return " ".join(re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name) for name in names)


def _foldable(model: nn.Module, name: str) -> bool:
    layer = model.get_submodule(name)
    if not isinstance(layer, SegmentLinear):
        return False
    return len(layer.parts) == 1 and layer.products()[0].smoothing is not None


def _linear(model: nn.Module, name: str) -> SegmentLinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, SegmentLinear)
    return layer


def _outputs(model: nn.Module, call: Call) -> torch.Tensor:
    found = list(tensors_of(run_call(model, call)))
    return torch.cat([each.double().flatten() for each in found]) if found else torch.zeros(1)


@contextmanager
def _unrounded(model: nn.Module) -> Iterator[None]:
    """Let inputs pass unrounded, so that a fold shows as what it is and not as codes that flip."""
    roundings = [module for module in model.modules() if isinstance(module, InputRounding)]
    for each in roundings:
        each.enabled = False
    try:
        yield
    finally:
        for each in roundings:
            each.enabled = True
