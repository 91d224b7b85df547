"""The graph read from torch.export, without running the model."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from qwodel.modeling.patterns.operations import Graph, Value
from qwodel.modeling.patterns.recording import is_layer

__all__ = ["exported_graph"]

_REPEATED = re.compile(r"@\d+")  # torch.export marks later calls of a module


def exported_graph(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Graph:
    """Export the model (non-strict, so that Python control flow is fixed) and read its graph."""
    program = torch.export.export(model, args, dict(kwargs), strict=False)
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    owners: dict[Value, str] = {}
    inputs: dict[fx.Node, Any] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        inputs[node] = value = _value(node.meta.get("val"))
        spec = kinds.get(node.name)
        if isinstance(value, Value) and spec is not None and spec.kind is not InputKind.USER_INPUT:
            value.constant = True
            owners[value] = str(spec.target).rpartition(".")[0]
    return _Reader(model, owners).read(program.graph_module, inputs)


def _value(example: Any) -> Any:
    return Value(tuple(map(int, example.shape))) if isinstance(example, torch.Tensor) else example


class _Reader:
    def __init__(self, model: nn.Module, owners: Mapping[Value, str]) -> None:
        self._modules = dict(model.named_modules())
        self._owners = owners
        self._graph = Graph()

    def read(self, module: fx.GraphModule, known: dict[fx.Node, Any]) -> Graph:
        self._walk(module, known)
        return self._graph

    def _walk(self, module: fx.GraphModule, known: dict[fx.Node, Any]) -> Any:
        """Follow one graph's nodes; ``known`` holds its placeholders. Return what it returns."""
        result = None
        for node in module.graph.nodes:
            if node.op == "get_attr":
                found = operator.attrgetter(node.target)(module)
                known[node] = (
                    Value(tuple(found.shape), constant=True) if isinstance(found, torch.Tensor) else found
                )
            elif node.op == "call_function":
                known[node] = self._call(node, known)
            elif node.op == "output":
                result = fx.map_arg(node.args[0], known.__getitem__)
        return result

    def _call(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        args: Any = fx.map_arg(node.args, known.__getitem__)
        kwargs: Any = fx.map_arg(node.kwargs, known.__getitem__)
        if node.target is operator.getitem:
            return args[0][args[1]]
        for place, item in enumerate(args):  # a region with its own gradient or autocast setting
            if isinstance(item, fx.GraphModule):
                inner = dict(zip(item.graph.find_nodes(op="placeholder"), args[place + 1 :], strict=True))
                return self._walk(item, inner)
        example = node.meta.get("val")
        several = isinstance(example, tuple | list)
        tensors: list[Any] = list(example) if isinstance(example, tuple | list) else [example]
        if not tensors or not all(isinstance(each, torch.Tensor) for each in tensors):
            return example
        name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
        shapes = [tuple(map(int, each.shape)) for each in tensors]
        call: Any = node.target
        outputs = self._graph.add(name.strip("_"), call, args, kwargs, shapes, self._layer(node, name, args))
        if name.endswith("_") and node.args and isinstance(node.args[0], fx.Node):
            known[node.args[0]] = outputs[0]  # an operation in place
        return outputs if several else outputs[0]

    def _layer(self, node: fx.Node, name: str, args: tuple[Any, ...]) -> str | None:
        """Return the layer that calls: the innermost module, else the owner of the weight."""
        if not name.startswith(("linear", "conv")):
            return None
        stack = node.meta.get("nn_module_stack") or {}
        path = _REPEATED.sub("", next(reversed(stack.values()))[0]) if stack else ""
        if is_layer(self._modules.get(path)):
            return path
        owner = self._owners.get(args[1], "") if len(args) > 1 and isinstance(args[1], Value) else ""
        return owner if is_layer(self._modules.get(owner)) else None
