"""The graph read while it runs: by torch.fx, or by hooks and a watch on torch's functions."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from qwodel.modeling.patterns.operations import Graph, Value

__all__ = ["fx_graph", "is_layer", "operation_name", "run_graph"]

_SPELLINGS = {"truediv": "div", "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div"}
_REFLECTED = {"radd": "add", "rmul": "mul", "rsub": "rsub", "rtruediv": "rdiv", "rpow": "rpow"}


def is_layer(module: nn.Module | None) -> bool:
    """Tell whether ``module`` is a linear layer or a convolution."""
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd)  # noqa: SLF001 - their only common base


def operation_name(function: Any) -> str:
    """Return a function's name without underscores; of a property, the property's."""
    name = str(getattr(function, "__name__", type(function).__name__))
    if name == "__get__":
        name = str(getattr(function.__self__, "__name__", name))
    name = name.strip("_")
    return _SPELLINGS.get(name) or _REFLECTED.get(name) or name


def run_graph(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Graph:
    """Run the model and record every call of a torch function; forward hooks say in which module."""
    record = _Record(model)
    stack: list[tuple[str, nn.Module]] = []
    names = {module: name for name, module in model.named_modules()}
    hooks = []
    for module in names:
        hooks += [
            module.register_forward_pre_hook(lambda inner, _: stack.append((names[inner], inner))),
            module.register_forward_hook(lambda *_: stack.pop() and None),
        ]

    def layer_of(operation: str) -> str | None:
        name, module = stack[-1] if stack else ("", None)
        return name if is_layer(module) and operation.startswith(("linear", "conv")) else None

    try:
        with _Watch(record, layer_of):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return record.graph


def fx_graph(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Graph:
    """Trace the model with torch.fx, then run the trace; what is not a tensor is fixed."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    fixed = {key: item for key, item in bound.arguments.items() if not isinstance(item, torch.Tensor)}
    traced = fx.symbolic_trace(model, concrete_args=fixed)
    interpreter = _Interpreter(traced, _Record(model))
    interpreter.run(*bound.arguments.values())
    return interpreter.record.graph


class _Record:
    """Tensors of a run, known by identity, as values of a graph."""

    def __init__(self, model: nn.Module) -> None:
        self.graph = Graph()
        self._values = WeakIdKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self._values[tensor] = Value(tuple(tensor.shape), constant=True)

    def call(
        self, name: str, function: Callable[..., Any], args: Any, kwargs: Any, result: Any, layer: str | None
    ) -> None:
        """Add a call that gave ``result``; one that gave no tensor is left out."""
        outputs = list(result) if isinstance(result, tuple | list) else [result]
        if not outputs or not all(isinstance(each, torch.Tensor) for each in outputs):
            return
        shapes = [tuple(each.shape) for each in outputs]
        values = self.graph.add(name, function, self._place(args), self._place(kwargs), shapes, layer)
        for tensor, value in zip(outputs, values, strict=True):
            self._values[tensor] = value

    def _place(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            if item not in self._values:
                self._values[item] = Value(tuple(item.shape))
            return self._values[item]
        if isinstance(item, tuple | list):
            return type(item)(map(self._place, item)) if type(item) in (tuple, list) else item
        if isinstance(item, dict):
            return {key: self._place(each) for key, each in item.items()}
        return item


class _Watch(TorchFunctionMode):
    def __init__(self, record: _Record, layer_of: Callable[[str], str | None]) -> None:
        super().__init__()
        self._record, self._layer_of = record, layer_of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = operation_name(func)
        self._record.call(name, func, args, kwargs or {}, result, self._layer_of(name))
        return result


class _Interpreter(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule, record: _Record) -> None:
        super().__init__(traced)
        self.record = record

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        if target is not operator.getitem or isinstance(args[0], torch.Tensor):
            self.record.call(operation_name(target), target, args, kwargs, result, None)
        return result

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_method(target, args, kwargs)

        def call(tensor: torch.Tensor, *rest: Any, **named: Any) -> Any:
            return getattr(tensor, target)(*rest, **named)

        self.record.call(str(target).strip("_"), call, args, kwargs, result, None)
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        result = super().call_module(target, args, kwargs)
        name = "linear" if isinstance(module, nn.Linear) else type(module).__name__.casefold()
        self.record.call(name, module, args, kwargs, result, target if is_layer(module) else None)
        return result
