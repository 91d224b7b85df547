"""Rounding a layer's inputs: which numbers they become, and which of them share a scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qwodel.algorithms.grid import round_to_grid
from qwodel.algorithms.quant_types import QuantType
from qwodel.exceptions import ConfigurationError

__all__ = ["Grid", "InputFormat", "InputRounding", "asymmetric_range", "input_grid"]

_SMALLEST = 1e-12


@dataclass(frozen=True, slots=True)
class InputFormat:
    """What inputs are rounded to.

    Attributes:
        quant_type: integers or FP8; ``None`` where inputs stay floating point.
        dtype: what inputs that stay floating point are cast to.
        per_token: a scale a row; else one for all of them.
        dynamic: scales are found while the layer runs; else they were calibrated.
        symmetric: the grid is symmetric about zero; else it has a zero point.
        dual: values below zero have a scale of their own. The sign of a code tells which scale it has.
    """

    quant_type: QuantType | None
    dtype: torch.dtype | None = None
    per_token: bool = False
    dynamic: bool = False
    symmetric: bool = True
    dual: bool = False

    def __post_init__(self) -> None:
        whole = self.quant_type is not None and not self.quant_type.is_float
        if not whole and (self.dual or not self.symmetric):
            raise ConfigurationError("zero points and dual scales are for integers")
        if self.dual and not self.symmetric:
            raise ConfigurationError("inputs have either a zero point or dual scales")
        if self.per_token and not self.dynamic:
            raise ConfigurationError(
                "a scale a token cannot be calibrated: tokens differ from run to run",
                hint="set dynamic, or axis None",
            )


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales of ``S`` segments: ``[1 or T, S]`` each. A value is ``(code − zero) · scale``.

    Attributes:
        zero: of asymmetric inputs, whole numbers.
        below: of dual inputs, the scale of what is less than zero.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None
    below: torch.Tensor | None = None


def asymmetric_range(quant_type: QuantType) -> tuple[float, float]:
    """Least and greatest code with a zero point: one more than of the symmetric grid."""
    return quant_type.qmin - 1, quant_type.qmax


def input_grid(low: torch.Tensor, high: torch.Tensor, form: InputFormat) -> Grid:
    """The grid that covers values from ``low`` ≤ 0 to ``high`` ≥ 0, each ``[R, S]``.

    Raises:
        ConfigurationError: the format has no grid.
    """
    if form.quant_type is None:
        raise ConfigurationError("inputs that stay floating point have no grid")
    qmax = form.quant_type.qmax
    if form.dual:
        return Grid((high / qmax).clamp_(min=_SMALLEST), None, (-low / qmax).clamp_(min=_SMALLEST))
    if form.symmetric:
        return Grid((torch.maximum(high, -low) / qmax).clamp_(min=_SMALLEST))
    least, most = asymmetric_range(form.quant_type)
    scale = ((high - low) / (most - least)).clamp_(min=_SMALLEST)
    return Grid(scale, (least - low / scale).round())


class InputRounding(nn.Module):
    """Rounds rows ``[T, N]`` whose columns fall into segments with scales of their own.

    Attributes:
        scale, zero_point, negative_scale: ``[S]`` of static inputs, else ``None``.
        enabled: ``False`` lets inputs pass as they are.
    """

    scale: torch.Tensor | None
    zero_point: torch.Tensor | None
    negative_scale: torch.Tensor | None

    def __init__(
        self, form: InputFormat, sizes: tuple[int, ...], device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.form, self.sizes, self.enabled = form, sizes, True
        static = form.quant_type is not None and not form.dynamic
        ones = torch.ones(len(sizes), dtype=torch.float32, device=device)
        self.register_buffer("scale", ones if static else None)
        self.register_buffer("zero_point", ones * 0 if static and not form.symmetric else None)
        self.register_buffer("negative_scale", ones.clone() if static and form.dual else None)

    def set_grid(self, grid: Grid) -> None:
        """Take the calibrated scales ``[1, S]``."""
        self.scale = grid.scale.reshape(-1).float()
        self.zero_point = None if grid.zero is None else grid.zero.reshape(-1).float()
        self.negative_scale = None if grid.below is None else grid.below.reshape(-1).float()

    def grid(self, rows: torch.Tensor, smoothing: torch.Tensor | None = None) -> Grid:
        """The scales of ``rows`` ``[T, N]``, divided by ``smoothing`` ``[N]`` first."""
        if self.scale is not None:
            zero = None if self.zero_point is None else self.zero_point[None]
            below = None if self.negative_scale is None else self.negative_scale[None]
            return Grid(self.scale[None], zero, below)
        rows = rows if smoothing is None else rows / smoothing
        dims = (1,) if self.form.per_token else (0, 1)
        pieces = torch.split(rows, list(self.sizes), dim=1) if len(self.sizes) > 1 else (rows,)
        low, high = [], []
        for piece in pieces:
            least, most = piece.amin(dim=dims, keepdim=True), piece.amax(dim=dims, keepdim=True)
            low.append(least.clamp_(max=0))
            high.append(most.clamp_(min=0))
        return input_grid(torch.cat(low, dim=1), torch.cat(high, dim=1), self.form)

    def codes(self, rows: torch.Tensor, grid: Grid, smoothing: torch.Tensor | None = None) -> torch.Tensor:
        """Codes ``[T, N]`` of ``rows / smoothing`` as fp32 numbers, with the zero point in them."""
        form = self.form
        assert form.quant_type is not None
        scaled = rows / self._divisor(grid.scale, smoothing)
        if grid.below is not None:
            scaled = torch.where(rows < 0, rows / self._divisor(grid.below, smoothing), scaled)
        if grid.zero is not None:
            least, most = asymmetric_range(form.quant_type)
            return scaled.round_().add_(self._spread(grid.zero)).clamp_(least, most)
        if form.quant_type.is_float:
            return round_to_grid(scaled, form.quant_type)
        return scaled.round_().clamp_(form.quant_type.qmin, form.quant_type.qmax)

    def values(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        """What codes stand for, ``[T, N]``."""
        if grid.zero is not None:
            codes = codes - self._spread(grid.zero)
        scale = self._spread(grid.scale)
        if grid.below is not None:
            scale = torch.where(codes < 0, self._spread(grid.below), scale)
        return codes * scale

    def forward(self, rows: torch.Tensor, smoothing: torch.Tensor | None = None) -> torch.Tensor:
        """``rows / smoothing`` ``[T, N]`` rounded, as fp32 numbers; the tensor given is left as it is."""
        if not self.enabled or self.form.quant_type is None:
            smoothed = rows if smoothing is None else rows / smoothing
            return _cast(smoothed, self.form.dtype) if self.enabled else smoothed
        grid = self.grid(rows, smoothing)
        return self.values(self.codes(rows, grid, smoothing), grid)

    def _divisor(self, scale: torch.Tensor, smoothing: torch.Tensor | None) -> torch.Tensor:
        """What rows are divided by to be codes: one division, whatever takes part in it."""
        spread = self._spread(scale)
        return spread if smoothing is None else spread * smoothing

    def _spread(self, scales: torch.Tensor) -> torch.Tensor:
        """``[R, S]`` → ``[R, N]``."""
        if len(self.sizes) == 1:
            return scales
        sizes = torch.tensor(self.sizes, device=scales.device)
        return scales.repeat_interleave(sizes, dim=1, output_size=sum(self.sizes))


def _cast(rows: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None:
        return rows
    limits = torch.finfo(dtype)
    return rows.clamp(limits.min, limits.max).to(dtype).float()
