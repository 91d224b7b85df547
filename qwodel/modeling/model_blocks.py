"""A lazily loaded model as a row of blocks, and the checkpoint weights that their layers consist of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qwodel.modeling.empty_models import tie_weights
from qwodel.modeling.lazy_model import LazyModel
from qwodel.modeling.observe.layers import LayerId, layers_to_record
from qwodel.modeling.stepwise import Arrival, run_in_step

__all__ = ["ModelBlocks", "find_units", "layer_name"]

_LARGE_EMBEDDING = 1 << 20  # numbers; smaller ones stay in memory


def layer_name(key: str) -> str:
    """A checkpoint weight's layer: its name without ``.weight``."""
    return key.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class ModelBlocks:
    """The parts of a model in which certain layers lie.

    Attributes:
        lazy: the model.
        keys: layer → the checkpoint weights it consists of.
        names: every module's name.
        units: the modules to load, run and unload one after another.
    """

    lazy: LazyModel
    keys: Mapping[LayerId, Sequence[str]]
    names: Mapping[nn.Module, str]
    units: tuple[nn.Module, ...]

    @classmethod
    def of(cls, lazy: LazyModel, wanted: Collection[str] | None = None) -> ModelBlocks:
        """The blocks that hold the layers ``wanted`` (checkpoint names), or all linear ones."""
        keys: dict[LayerId, list[str]] = {}
        for name, _ in lazy.model.named_parameters(remove_duplicate=False):
            for part in lazy.parts(name):
                if wanted is None or layer_name(part.key) in wanted:
                    expert = part.index if part.pattern and "*" in part.pattern else None
                    keys.setdefault((name, expert), []).append(part.key)
        recorded = layers_to_record(lazy.model, {name for name, _ in keys})
        names = {module: name for name, module in lazy.model.named_modules()}
        return cls(lazy, keys, names, tuple(find_units(lazy.model, list(recorded.values()))))

    def layers_in(self, unit: nn.Module) -> dict[str, nn.Module]:
        """The layers inside a unit, by their names in the model."""
        name = self.names[unit]
        found = layers_to_record(unit, {parameter.removeprefix(f"{name}.") for parameter, _ in self.keys})
        return {f"{name}.{inner}" if inner else name: module for inner, module in found.items()}

    def weights_of(self, layers: Sequence[LayerId]) -> list[str]:
        """The checkpoint weights that some layers consist of."""
        return [key for layer in layers for key in self.keys.get(layer, ())]

    def run(
        self,
        batches: Sequence[Mapping[str, Any]],
        visit: Callable[[nn.Module, Sequence[Arrival]], Iterator[Any]],
    ) -> None:
        """Take all batches through the units; what lies outside is loaded first, the head is not.

        Large embeddings are in memory only while they are used.
        """
        model = self.lazy.model
        embeddings = _LargeEmbeddings(self)
        _load_outside(self.lazy, model, "", frozenset((*self.units, *embeddings.modules)))
        tie_weights(model)

        def visit_alone(unit: nn.Module, arrivals: Sequence[Arrival]) -> Iterator[Any]:
            embeddings.unload()
            yield from visit(unit, arrivals)

        with torch.no_grad(), embeddings:
            run_in_step(lambda batch: model(**batch), batches, self.units, visit_alone)


class _LargeEmbeddings:
    """Embeddings outside the units, loaded when the model calls one of them."""

    def __init__(self, blocks: ModelBlocks) -> None:
        self._lazy, self._names = blocks.lazy, blocks.names
        head = _head(blocks.lazy.model)
        self._unused_head = None if head in blocks.units else head
        inside = {module for unit in blocks.units for module in unit.modules()}
        self.modules = tuple(
            module
            for module in blocks.names
            if isinstance(module, nn.Embedding)
            and module not in inside
            and module.weight.numel() >= _LARGE_EMBEDDING
        )
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        self._hooks = [each.register_forward_pre_hook(self._load) for each in self.modules]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _load(self, module: nn.Module, _: object) -> None:
        if not next(module.parameters()).is_meta:
            return
        for each in self.modules:
            self._lazy.load(each, self._names[each])
        # One may be tied to another and have no weight of its own.
        tie_weights(self._lazy.model)

    def unload(self) -> None:
        """Take them out of memory."""
        for each in self.modules:
            self._lazy.unload(each)
        if self._unused_head is not None:
            # Tied to an embedding, it holds on to the embedding's weight.
            self._lazy.unload(self._unused_head)


def _head(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


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
    head = _head(lazy.model)
    for inner, child in module.named_children():
        full = f"{name}.{inner}" if name else inner
        if child in units or child is head:
            continue
        if units.intersection(child.modules()):
            _load_outside(lazy, child, full, units)
        else:
            lazy.load(child, full)
    lazy.load_own(module, name)
