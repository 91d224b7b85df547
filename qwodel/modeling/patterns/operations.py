"""A network's graph as operations on values, whoever recorded it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Graph", "GraphOperation", "Value", "values_in"]


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the graph: its shape, what gave it, and what reads it.

    ``constant`` marks what depends on parameters and buffers alone.
    """

    shape: tuple[int, ...]
    producer: GraphOperation | None = None
    readers: list[GraphOperation] = field(default_factory=list)
    constant: bool = False


@dataclass(eq=False, slots=True)
class GraphOperation:
    """One call: ``name`` without namespace, overload and underscores; values stand where tensors stood.

    ``layer`` names the linear layer or convolution that made the call.
    """

    name: str
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: list[Value] = field(default_factory=list)
    layer: str | None = None

    def inputs(self) -> list[Value]:
        """Return the values it reads, in the order of its arguments."""
        return list(values_in((self.args, dict(self.kwargs))))

    def replay(self, value: Value, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Call it with ``tensor`` (of the value's shape) in place of ``value``: for moves of data only."""

        def place(item: Any) -> Any:
            return tensor if item is value else item

        result = self.call(*map(place, self.args), **{key: place(item) for key, item in self.kwargs.items()})
        return list(result) if isinstance(result, tuple | list) else [result]

    def output_of(self, value: Value) -> int:
        """Return which of its outputs ``value`` is."""
        return next(place for place, each in enumerate(self.outputs) if each is value)


@dataclass(slots=True)
class Graph:
    """Operations in the order in which they ran."""

    operations: list[GraphOperation] = field(default_factory=list)

    def add(
        self,
        name: str,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        shapes: list[tuple[int, ...]],
        layer: str | None = None,
    ) -> list[Value]:
        """Append an operation and return its outputs."""
        operation = GraphOperation(name, call, args, kwargs, layer=layer)
        inputs = operation.inputs()
        constant = bool(inputs) and all(value.constant for value in inputs)
        operation.outputs = [Value(shape, operation, constant=constant) for shape in shapes]
        for value in inputs:
            value.readers.append(operation)
        self.operations.append(operation)
        return operation.outputs


def values_in(item: Any) -> Iterator[Value]:
    """Yield the values in nested tuples, lists and dictionaries."""
    if isinstance(item, Value):
        yield item
    elif isinstance(item, tuple | list):
        for each in item:
            yield from values_in(each)
    elif isinstance(item, Mapping):
        for each in item.values():
            yield from values_in(each)
