"""MIL operations with weights: products, convolutions, normalizations, pooling, attention."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from qwodel.backends.coreml.mil.registry import flag, integers, operation

__all__: list[str] = []

Tensor = torch.Tensor


@operation("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight, bias)


@operation("matmul")
def matmul(
    x: Tensor, y: Tensor, transpose_x: Tensor | None = None, transpose_y: Tensor | None = None
) -> Tensor:
    x = x.transpose(-1, -2) if flag(transpose_x) else x
    return x @ (y.transpose(-1, -2) if flag(transpose_y) else y)


@operation("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask)


def _padding(
    sizes: torch.Size,
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    kind: str,
    pad: Tensor | None,
) -> list[int]:
    """Amounts for :func:`torch.nn.functional.pad`, last axis first."""
    if kind == "custom":
        amounts = integers(pad, [0, 0] * len(kernel))
        pairs = [(amounts[2 * axis], amounts[2 * axis + 1]) for axis in range(len(kernel))]
    elif kind in ("same", "same_lower"):
        pairs = []
        for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
            total = max(0, (math.ceil(size / stride) - 1) * stride + (width - 1) * dilation + 1 - size)
            small, large = total // 2, total - total // 2
            pairs.append((small, large) if kind == "same" else (large, small))
    else:
        pairs = [(0, 0)] * len(kernel)
    return [amount for pair in reversed(pairs) for amount in pair]


@operation("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | int = 1,
) -> Tensor:
    rank = x.ndim - 2
    stride, dilation = integers(strides, [1] * rank), integers(dilations, [1] * rank)
    x = functional.pad(x, _padding(x.shape[2:], list(weight.shape[2:]), stride, dilation, pad_type, pad))
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    return function(x, weight, bias, stride, 0, dilation, int(groups))


@operation("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    return functional.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))


@operation("instance_norm")
def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Tensor | float = 1e-5
) -> Tensor:
    return functional.instance_norm(x, weight=gamma, bias=beta, eps=float(epsilon))


@operation("layer_norm")
def layer_norm(
    x: Tensor,
    axes: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    dims = sorted(axis % x.ndim for axis in integers(axes, list(range(x.ndim))))
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square().mean(dims, keepdim=True)
    shape = [size if axis in dims else 1 for axis, size in enumerate(x.shape)]
    result = (x - mean) * torch.rsqrt(variance + float(epsilon))
    result = result if gamma is None else result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


@operation("l2_norm")
def l2_norm(x: Tensor, epsilon: Tensor | float = 1e-6) -> Tensor:
    axes = (-3, -2, -1)
    return x * torch.rsqrt(x.square().sum(axes, keepdim=True) + float(epsilon))


@operation("max_pool")
def max_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    ceil_mode: Tensor | None = None,
) -> Tensor:
    kernel = integers(kernel_sizes)
    stride = integers(strides, [1] * len(kernel))
    amounts = _padding(x.shape[2:], kernel, stride, [1] * len(kernel), pad_type, pad)
    x = functional.pad(x, amounts, value=-math.inf)
    function = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(kernel) - 1]
    return function(x, kernel, stride, ceil_mode=flag(ceil_mode))


@operation("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    exclude_padding_from_average: Tensor | None = None,
    ceil_mode: Tensor | None = None,
) -> Tensor:
    kernel = integers(kernel_sizes)
    stride = integers(strides, [1] * len(kernel))
    amounts = _padding(x.shape[2:], kernel, stride, [1] * len(kernel), pad_type, pad)
    function = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(kernel) - 1]
    pooled = function(functional.pad(x, amounts), kernel, stride, ceil_mode=flag(ceil_mode))
    if flag(exclude_padding_from_average):
        inside = functional.pad(torch.ones_like(x), amounts)
        pooled = pooled / function(inside, kernel, stride, ceil_mode=flag(ceil_mode))
    return pooled
