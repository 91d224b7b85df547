"""Building a network without the memory of its weights, unseen by every other thread.

accelerate's ``init_empty_weights`` replaces ``nn.Module.register_parameter``, and transformers sets
torch's default dtype while it builds: both concern the whole process, and layers that another thread
builds meanwhile. Here a registration hook asks whether its own thread is building, and a function mode,
which is a thread's own, stands for the default dtype.
"""

from __future__ import annotations

import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qwodel.process_state import MODEL_BUILDING

__all__ = ["empty_transformers_model", "parameters_on_meta", "tie_weights"]


_LONGEST_LOAD = 60.0
"""Seconds another thread may need to build a model without its weights."""


class _Here(threading.local):
    building = False


_here = _Here()
_hooking = threading.Lock()
_hooked = False


def _to_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """The parameter without its numbers where this thread is building; in any other, as it is."""
    if not _here.building or parameter is None:
        return None
    attributes = dict(parameter.__dict__)
    empty = type(parameter)(parameter.to("meta"), requires_grad=parameter.requires_grad)
    empty.__dict__.update(attributes)
    return empty


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put the parameters of modules that this thread builds on the meta device; buffers stay real."""
    _hook_once()
    before = _here.building
    _here.building = True
    try:
        yield
    finally:
        _here.building = before


def _hook_once() -> None:
    """Set the hook for good: to take it away would break a loop over hooks in another thread."""
    global _hooked
    with _hooking:
        if not _hooked:
            hook: Callable[..., Any] = _to_meta  # torch's annotation forgets what a hook may return
            nn.modules.module.register_module_parameter_registration_hook(hook)
            _hooked = True


def empty_transformers_model(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """What ``cls._from_config(config, dtype=dtype)`` builds, with parameters on the meta device.

    transformers wraps ``nn.init`` for the whole process while it initializes, in functions that do the
    same; so one model is built at a time.

    Args:
        cls: a class of transformers.
        config: its configuration, whose dtype is set.
        dtype: of parameters and of buffers that name none.
    """
    from transformers import PreTrainedConfig

    with MODEL_BUILDING, parameters_on_meta(), _Creating(dtype):
        if _asks_for_default(cls):
            # No mode answers torch.get_default_dtype(); these few architectures get the real one.
            return cls._from_config(config, dtype=dtype)
        # Without a dtype, transformers leaves torch's default alone.
        _set_dtype(config, None)
        model = cls._from_config(config, dtype=None)
    for module in model.modules():
        if isinstance(found := getattr(module, "config", None), PreTrainedConfig) and found.dtype is None:
            _set_dtype(found, dtype)  # some architectures hand copies to their parts
    _set_dtype(config, dtype)
    return model


def _set_dtype(config: Any, dtype: torch.dtype | None) -> None:
    config.dtype = dtype
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            _set_dtype(inner, dtype)


def tie_weights(model: Any) -> None:
    """Tie a transformers model's weights.

    While transformers loads any model, tying does nothing in the whole process: our own loads are kept
    out, and for one of another thread's this waits.
    """
    with MODEL_BUILDING:
        given_up = time.monotonic() + _LONGEST_LOAD
        while model.tie_weights.__name__ != "tie_weights" and time.monotonic() < given_up:
            time.sleep(0.01)
        model.tie_weights()


def _asks_for_default(cls: type) -> bool:
    module = sys.modules.get(cls.__module__)
    try:
        return module is not None and "get_default_dtype" in inspect.getsource(module)
    except (OSError, TypeError):
        return False


_FLOATING = frozenset({"empty", "ones", "zeros", "rand", "randn", "linspace", "logspace", "eye"}) | {
    f"{window}_window" for window in ("bartlett", "blackman", "hamming", "hann", "kaiser")
}
"""Factories whose result has the default dtype unless they are told another."""
_FROM_NUMBERS = frozenset({"tensor", "as_tensor", "scalar_tensor", "full", "arange", "range", "normal"})
"""Factories whose result may have the default dtype, by what numbers they are given."""
_EXPLICIT = frozenset({"to", "type", "type_as", "float", "double", "half", "bfloat16", "view"})
_RANDOM = frozenset({"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}) | frozenset(
    f"{name}_"
    for name in ("normal", "uniform", "random", "bernoulli", "exponential", "log_normal", "cauchy", "geometric",
                 "kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal", "trunc_normal", "orthogonal",
                 "sparse")
)  # fmt: skip


class _Creating(TorchFunctionMode):
    """Creates as if torch's default dtype were another, and draws from a generator of its own.

    Args:
        dtype: takes the place of torch's default.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(0)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, given = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in _RANDOM and given.get("generator") is None and _on_cpu(args, given):
            given["generator"] = self._generator
        if self._dtype == torch.get_default_dtype():
            return func(*args, **given)
        if (
            name in _FLOATING
            and given.get("dtype") is None
            and not isinstance(given.get("out"), torch.Tensor)
        ):
            return func(*args, **given | {"dtype": self._dtype})
        result = func(*args, **given)
        if name in _EXPLICIT or not self._by_default(result, (*args, *given.values())):
            return result
        if name in _FROM_NUMBERS:
            return func(*args, **given | {"dtype": self._dtype})
        if name == "where":  # between two numbers, by a condition that must stay one
            return result.to(self._dtype)
        return func(
            *map(self._promoted, args), **{key: self._promoted(value) for key, value in given.items()}
        )

    def _by_default(self, result: Any, inputs: Sequence[Any]) -> bool:
        """Whether a result is floating only because numbers that are not have become so."""
        if not isinstance(result, torch.Tensor) or result.dtype != torch.get_default_dtype():
            return False
        return not any(isinstance(each, torch.dtype) or _floating(each) for each in _flat(inputs))

    def _promoted(self, value: Any) -> Any:
        """An integral tensor as torch's promotion would make it."""
        return value.to(self._dtype) if isinstance(value, torch.Tensor) else value


def _floating(value: Any) -> bool:
    """Whether a tensor or an array, or a number of numpy's, brings a floating dtype of its own."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return getattr(getattr(value, "dtype", None), "kind", "") in ("f", "c")


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for each in values:
        if isinstance(each, list | tuple):
            yield from _flat(each)
        else:
            yield each


def _on_cpu(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a random function works on the CPU: the only generator that a mode may replace."""
    device = kwargs.get("device") or next(
        (each.device for each in args if isinstance(each, torch.Tensor)), "cpu"
    )
    return torch.device(device).type == "cpu"
