"""Element-wise MIL operations and reductions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from qwodel.backends.coreml.mil.registry import OPERATIONS, flag, integers, operation

__all__: list[str] = []

Tensor = torch.Tensor

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs, "acos": torch.acos, "asin": torch.asin, "atan": torch.atan, "atanh": torch.atanh,
    "ceil": torch.ceil, "cos": torch.cos, "cosh": torch.cosh, "erf": torch.erf, "exp": torch.exp,
    "exp2": torch.exp2, "floor": torch.floor, "logical_not": torch.logical_not, "relu": torch.relu,
    "relu6": functional.relu6, "round": torch.round, "sigmoid": torch.sigmoid, "sign": torch.sign,
    "silu": functional.silu, "sin": torch.sin, "sinh": torch.sinh, "softplus": functional.softplus,
    "softsign": functional.softsign, "sqrt": torch.sqrt, "square": torch.square, "tan": torch.tan,
    "tanh": torch.tanh, "identity": torch.clone,
}  # fmt: skip
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "maximum": torch.maximum, "minimum": torch.minimum,
    "pow": torch.pow, "floor_div": lambda x, y: torch.div(x, y, rounding_mode="floor"), "mod": torch.remainder,
    "equal": torch.eq, "not_equal": torch.ne, "greater": torch.gt, "greater_equal": torch.ge,
    "less": torch.lt, "less_equal": torch.le, "logical_and": torch.logical_and,
    "logical_or": torch.logical_or, "logical_xor": torch.logical_xor,
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "reduce_sum": lambda x, axes, keep: x.sum(axes, keep),
    "reduce_mean": lambda x, axes, keep: x.mean(axes, keep),
    "reduce_max": lambda x, axes, keep: x.amax(axes, keep),
    "reduce_min": lambda x, axes, keep: x.amin(axes, keep),
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keep),
    "reduce_l1_norm": lambda x, axes, keep: x.abs().sum(axes, keep),
    "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
    "reduce_log_sum_exp": lambda x, axes, keep: x.logsumexp(axes, keep),
}
for _name, _unary in _UNARY.items():
    OPERATIONS[_name] = lambda x, function=_unary: function(x)
for _name, _binary in _BINARY.items():
    OPERATIONS[_name] = lambda x, y, function=_binary: function(x, y)


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axes: Tensor | None = None, keep_dims: Tensor | None = None) -> Tensor:
        return function(x, integers(axes, list(range(x.ndim))), flag(keep_dims))

    return reduce


for _name, _reduce in _REDUCTIONS.items():
    OPERATIONS[_name] = _reduction(_reduce)


@operation("real_div")
def real_div(x: Tensor, y: Tensor) -> Tensor:
    # Integers divide as integers: shapes are computed so.
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@operation("rsqrt")
def rsqrt(x: Tensor, epsilon: Tensor | float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


@operation("log")
def log(x: Tensor, epsilon: Tensor | float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@operation("inverse")
def inverse(x: Tensor, epsilon: Tensor | float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


@operation("clip")
def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return x.clamp(alpha, beta)


@operation("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


@operation("leaky_relu")
def leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


@operation("elu")
def elu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= 0, x, alpha * torch.expm1(x))


@operation("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= 0, x, alpha.reshape(-1, *[1] * (x.ndim - 2)) * x)


@operation("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: Tensor | float = 0.2, beta: Tensor | float = 0.5) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


@operation("select")
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


@operation("cast")
def cast(x: Tensor, dtype: str) -> Tensor:
    kinds = {"fp16": torch.float32, "fp32": torch.float32, "bool": torch.bool}
    if x.is_floating_point() and dtype not in kinds:
        x = x.trunc()
    x = x.to(kinds.get(dtype, torch.int32))
    if dtype in ("int16", "uint16", "int8", "uint8"):  # kept in int32, with the narrow type's range
        span = 1 << int(dtype.lstrip("uint"))
        low = 0 if dtype.startswith("u") else -span // 2
        x = (x - low) % span + low
    return x


@operation("softmax")
def softmax(x: Tensor, axis: Tensor | int = -1) -> Tensor:
    return torch.softmax(x, int(axis))


@operation("cumsum")
def cumsum(
    x: Tensor, axis: Tensor | int = 0, exclusive: Tensor | None = None, reverse: Tensor | None = None
) -> Tensor:
    axis = int(axis)
    if flag(reverse):
        x = x.flip(axis)
    total = x.cumsum(axis)
    if flag(exclusive):
        total = total - x
    return total.flip(axis) if flag(reverse) else total


@operation("reduce_argmax")
def reduce_argmax(x: Tensor, axis: Tensor | int = -1, keep_dims: Tensor | None = None) -> Tensor:
    return x.argmax(int(axis), flag(keep_dims))


@operation("reduce_prod")
def reduce_prod(x: Tensor, axes: Tensor | None = None, keep_dims: Tensor | None = None) -> Tensor:
    for axis in sorted((each % x.ndim for each in integers(axes, list(range(x.ndim)))), reverse=True):
        x = x.prod(axis, flag(keep_dims))
    return x


@operation("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: Tensor | float = 1.0, beta: Tensor | float = 1.0) -> Tensor:
    return alpha * torch.tanh(beta * x)
