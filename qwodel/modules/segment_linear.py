"""A linear layer quantized along seams: segments of its inputs and of its outputs have scales of their own.

``y = Q(x / s) R̂ᵀ + (x / s) L₂ᵀ L₁ᵀ + b``: s smooths, L₁ L₂ is a low-rank branch in floating point, R̂ the
codes of what is left of the weight. Output segments with a smoothing of their own are parts; all others
share one product, since scales of rows take whatever scale a segment has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import nn

from qwodel.modules.input_rounding import Grid, InputRounding
from qwodel.modules.int8_arithmetic import int8_product
from qwodel.modules.weight_codes import WeightCodes

__all__ = [
    "SegmentLinear",
    "SegmentProduct",
    "common_cuts",
    "multiplies_integers",
    "multiply_codes",
    "scaled_mm_works",
]

_FP8_MULTIPLE = 16  # torch._scaled_mm takes such sizes


class SegmentProduct(nn.Module):
    """``[T, N]`` → ``[T, M]`` without bias, for outputs that share a smoothing.

    Attributes:
        inputs: rounds the smoothed inputs.
        weight: codes of the smoothed weight, less the low-rank branch.
        smoothing: ``[N]`` what inputs are divided by, or ``None``.
        down, up: ``[r, N]`` and ``[M, r]`` of the low-rank branch, or ``None``.
    """

    smoothing: torch.Tensor | None
    down: torch.Tensor | None
    up: torch.Tensor | None

    def __init__(
        self,
        inputs: InputRounding,
        weight: WeightCodes,
        *,
        smoothing: torch.Tensor | None = None,
        down: torch.Tensor | None = None,
        up: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.inputs, self.weight = inputs, weight
        self.register_buffer("smoothing", smoothing)
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    def forward(self, rows: torch.Tensor, *, real: bool = False) -> torch.Tensor:
        """The product of fp32 ``rows``; ``real`` multiplies the codes where something can."""
        smoothing = self.smoothing
        real = real and self.inputs.enabled
        if real and multiplies_integers(self.inputs, self.weight):
            grid = self.inputs.grid(rows, smoothing)
            codes = self.inputs.codes(rows, grid, smoothing)
            out = multiply_codes(codes, grid, self.inputs.sizes, self.weight)
        elif real and self._fp8(rows):
            out = self._fp8_product(rows)
        else:
            out = self.inputs(rows, smoothing) @ self.weight.values().T
        if self.down is not None and self.up is not None:
            down = self.down.to(rows) if smoothing is None else self.down.to(rows) / smoothing
            out = torch.addmm(out, rows @ down.T, self.up.to(rows).T)
        return out

    def dequantize(self) -> torch.Tensor:
        """The weight that unrounded inputs would meet, fp32 ``[M, N]``."""
        weight = self.weight.values()
        if self.down is not None and self.up is not None:
            weight = weight + self.up.float() @ self.down.float()
        return weight if self.smoothing is None else weight / self.smoothing

    def scale_outputs(self, factors: torch.Tensor) -> None:
        """Multiply the outputs by ``[M]`` numbers, exactly."""
        self.weight.scale_rows(factors)
        if self.up is not None:
            self.up = (self.up.double() * factors[:, None].double()).to(self.up.dtype)

    def _fp8(self, rows: torch.Tensor) -> bool:
        kinds = (self.inputs.form.quant_type, self.weight.quant_type)
        if any(kind is None or not kind.is_float for kind in kinds):
            return False
        one = len(self.inputs.sizes) == 1 and len(self.weight.sizes) == 1
        fits = all(size % _FP8_MULTIPLE == 0 for size in self.weight.shape)
        return one and fits and scaled_mm_works(rows.device.type, rows.device.index)

    def _fp8_product(self, rows: torch.Tensor) -> torch.Tensor:
        kind, scale = self.inputs.form.quant_type, self.weight.scale
        assert kind is not None
        assert scale is not None
        grid = self.inputs.grid(rows, self.smoothing)
        codes = self.inputs.codes(rows, grid, self.smoothing).to(kind.dtype)
        one = torch.ones((), dtype=torch.float32, device=rows.device)
        product = torch._scaled_mm(codes, self.weight.codes.t(), one, one, out_dtype=torch.float32)  # noqa: SLF001
        return product * grid.scale * scale.T


def multiplies_integers(inputs: InputRounding, weight: WeightCodes) -> bool:
    """Whether both are integers of at most eight bits."""
    kinds = (inputs.form.quant_type, weight.quant_type)
    return all(kind is not None and not kind.is_float and kind.bits <= 8 for kind in kinds)


def multiply_codes(
    codes: torch.Tensor, grid: Grid, sizes: Sequence[int], weight: WeightCodes
) -> torch.Tensor:
    """``[T, N]`` integer codes times a weight's, ``[T, M]`` in fp32: one integer product a pair of scales.

    Args:
        grid: scales of the codes' segments, ``[1 or T, S]``.
        sizes: columns of the segments.
    """
    numbers, scale = weight.integers(), weight.scale
    assert scale is not None
    if grid.below is not None:
        # One product of twice the rows: codes above zero, then those below it.
        codes = torch.cat((codes.clamp(min=0), codes.clamp(max=0)))
    codes = codes.to(torch.int8)
    out: torch.Tensor | None = None
    for (start, stop), segment, group in common_cuts(sizes, weight.sizes):
        left, right = codes[:, start:stop].contiguous(), numbers[:, start:stop].contiguous()
        product = int8_product(left, right)
        part = slice(segment, segment + 1)
        zero = None if grid.zero is None else grid.zero[:, part]
        other = None if weight.zero_point is None else weight.zero_point[:, group]
        product = _without_zeros(product, left, right, zero, other)
        if grid.below is not None:
            above, below = product.chunk(2)
            product = (above * grid.scale[:, part] + below * grid.below[:, part]).mul_(scale[:, group])
        elif len(grid.scale) == 1:
            product = product * (grid.scale[:, part] * scale[:, group])
        else:
            product = (product * grid.scale[:, part]).mul_(scale[:, group])
        out = product if out is None else out.add_(product)
    assert out is not None
    return out


def _without_zeros(
    product: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    zero: torch.Tensor | None,
    other: torch.Tensor | None,
) -> torch.Tensor:
    """``(left − zero)(right − other)ᵀ`` from ``left rightᵀ``; ``zero`` ``[1 or T, 1]``, ``other`` ``[M]``."""
    if zero is None and other is None:
        return product
    exact = product.double()  # sums of codes and zero points can pass 2²⁴
    sums = right.sum(dim=1, dtype=torch.int32).double()
    if other is not None:
        exact = exact - left.sum(dim=1, keepdim=True, dtype=torch.int32) * other.double()
        sums = sums - left.shape[1] * other.double()
    return (exact if zero is None else exact - zero.double() * sums).float()


def common_cuts(first: Sequence[int], second: Sequence[int]) -> Iterator[tuple[tuple[int, int], int, int]]:
    """``((start, stop), index in first, index in second)`` of the pieces that both divisions cut."""
    i = j = start = 0
    left, right = first[0], second[0]
    while True:
        stop = min(left, right)
        yield (start, stop), i, j
        start = stop
        if left == stop:
            i += 1
            if i == len(first):
                return
            left += first[i]
        if right == stop:
            j += 1
            right += second[j]


@cache
def scaled_mm_works(device: str, index: int | None = None) -> bool:
    """Whether a device multiplies FP8 matrices; tried once. A CPU emulates them as fast by itself."""
    if device != "cuda":
        return False
    where = torch.device(device, index or 0)
    one = torch.ones((), dtype=torch.float32, device=where)
    number = torch.eye(16, dtype=torch.float32, device=where).to(torch.float8_e4m3fn)
    try:
        found = torch._scaled_mm(number, number.t(), one, one, out_dtype=torch.float32)  # noqa: SLF001
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return torch.equal(found, torch.eye(16, dtype=torch.float32, device=where))


class SegmentLinear(nn.Module):
    """``x → x Wᵀ + b`` for ``x`` ``[..., N]``, quantized.

    Attributes:
        parts: products of consecutive outputs.
        bias: ``[M]`` or ``None``.
        real: multiply codes; else multiply in fp32 what they stand for.
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        parts: Sequence[SegmentProduct],
        bias: torch.Tensor | None,
        *,
        real: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.register_buffer("bias", bias)
        self.real, self.dtype = real, dtype
        self.in_features = parts[0].weight.shape[1]
        self.out_features = sum(part.weight.shape[0] for part in parts)

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        """``[..., N]`` → ``[..., M]`` in the dtype of ``x``."""
        rows = x.reshape(-1, self.in_features).float()
        out = [part(rows, real=self.real) for part in self.products()]
        joined = out[0] if len(out) == 1 else torch.cat(out, dim=1)
        if self.bias is not None:
            joined.add_(self.bias)
        return joined.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def products(self) -> list[SegmentProduct]:
        """The parts, typed."""
        return [part for part in self.parts if isinstance(part, SegmentProduct)]

    def dequantize(self) -> torch.Tensor:
        """The weight that unrounded inputs would meet, fp32 ``[M, N]``."""
        return torch.cat([part.dequantize() for part in self.products()])

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight in the layer's dtype: models look at it, and compute with :meth:`forward`."""
        return self.dequantize().to(self.dtype)

    def scale_outputs(self, factors: torch.Tensor) -> None:
        """Multiply the outputs by ``[M]`` numbers: codes stay as they are."""
        start = 0
        for part in self.products():
            rows = part.weight.shape[0]
            part.scale_outputs(factors[start : start + rows])
            start += rows
        if self.bias is not None:
            self.bias = (self.bias.double() * factors.double()).to(self.bias.dtype)

    def extra_repr(self) -> str:
        """Sizes, and whether real arithmetic is used."""
        return f"{self.in_features}, {self.out_features}, real={self.real}"
