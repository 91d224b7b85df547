"""A convolution whose weights and inputs are quantized: a linear layer on patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from qwodel.modules.input_rounding import Grid, InputRounding
from qwodel.modules.segment_linear import multiplies_integers, multiply_codes
from qwodel.modules.weight_codes import WeightCodes

__all__ = ["ConvGeometry", "QuantizedConv"]

_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass(frozen=True, slots=True)
class ConvGeometry:
    """How a convolution walks over its inputs.

    Attributes:
        sides: padding before and after each dimension, the last dimension first.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    sides: tuple[int, ...]
    groups: int
    mode: str

    @classmethod
    def of(cls, conv: Any) -> Self:
        """The geometry of an ``nn.Conv1d``, ``2d`` or ``3d``."""
        sides = tuple(conv._reversed_padding_repeated_twice)  # noqa: SLF001  (what it pads itself with)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return cls(
            tuple(conv.kernel_size), tuple(conv.stride), tuple(conv.dilation), sides, conv.groups, mode
        )

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Pad ``[batch, channels, *spatial]`` as the convolution would pad itself."""
        return functional.pad(x, self.sides, mode=self.mode) if any(self.sides) else x

    @property
    def has_patches(self) -> bool:
        """Whether the convolution is one matrix product: two dimensions, no groups."""
        return len(self.kernel) == 2 and self.groups == 1

    def patches(self, padded: torch.Tensor) -> torch.Tensor:
        """``[B, C, H, W]`` → ``[B · positions, C · k · k]``."""
        found = functional.unfold(padded, self.kernel, dilation=self.dilation, stride=self.stride)
        return found.transpose(1, 2).reshape(-1, found.shape[1])


class QuantizedConv(nn.Module):
    """A convolution with a scale for each output channel, and one for its inputs (or one an image).

    Attributes:
        weight_codes: ``[M, C/groups · k · …]``.
        inputs: rounds images as rows.
        bias: ``[M]`` or ``None``.
        real: multiply codes of two-dimensional convolutions without groups.
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        inputs: InputRounding,
        weight: WeightCodes,
        bias: torch.Tensor | None,
        geometry: ConvGeometry,
        *,
        real: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.inputs, self.weight_codes, self.geometry = inputs, weight, geometry
        self.register_buffer("bias", bias)
        self.real, self.dtype = real, dtype
        self.out_channels = weight.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images in, images out, in the dtype of ``x``."""
        batched = x.ndim == len(self.geometry.kernel) + 2
        padded = self.geometry.pad((x if batched else x[None]).float())
        real = self.real and self.inputs.enabled and self.geometry.has_patches
        real = real and multiplies_integers(self.inputs, self.weight_codes)
        out = self._integer(padded) if real else self._emulated(padded)
        if self.bias is not None:
            out = out + self.bias.reshape(-1, *[1] * len(self.geometry.kernel))
        return (out if batched else out[0]).to(x.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight in the layer's dtype."""
        return self._kernel().to(self.dtype)

    def _kernel(self) -> torch.Tensor:
        matrix = self.weight_codes.values()
        return matrix.reshape(len(matrix), -1, *self.geometry.kernel)

    def _emulated(self, padded: torch.Tensor) -> torch.Tensor:
        rounded = self.inputs(padded.flatten(1)).reshape(padded.shape)
        convolve: Any = _CONVOLVE[len(self.geometry.kernel)]
        out: torch.Tensor = convolve(
            rounded,
            self._kernel(),
            stride=self.geometry.stride,
            dilation=self.geometry.dilation,
            groups=self.geometry.groups,
        )
        return out

    def _integer(self, padded: torch.Tensor) -> torch.Tensor:
        flat = padded.flatten(1)
        grid = self.inputs.grid(flat)
        codes = self.geometry.patches(self.inputs.codes(flat, grid).reshape(padded.shape))
        positions = len(codes) // len(padded)
        each = [None if part is None else _per_position(part, positions) for part in (grid.zero, grid.below)]
        spread = Grid(_per_position(grid.scale, positions), *each)
        out = multiply_codes(codes, spread, (codes.shape[1],), self.weight_codes)
        spatial = [
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation in zip(
                padded.shape[2:],
                self.geometry.kernel,
                self.geometry.stride,
                self.geometry.dilation,
                strict=True,
            )
        ]
        return out.reshape(len(padded), positions, -1).transpose(1, 2).reshape(len(padded), -1, *spatial)

    def extra_repr(self) -> str:
        """Kernel, stride, groups, and whether real arithmetic is used."""
        return f"{self.geometry.kernel}, stride={self.geometry.stride}, groups={self.geometry.groups}, real={self.real}"


def _per_position(scales: torch.Tensor, positions: int) -> torch.Tensor:
    return scales if len(scales) == 1 else scales.repeat_interleave(positions, dim=0)
