"""A linear layer whose weights are INT8 and whose product is an integer one.

``y = (x_q W_qᵀ) · s_x · s_w + b`` with x rounded token by token, as a whole, or with a static scale.
The product is ``torch._int_mm``, on the CPU and on CUDA. Whether that operator computes what it
should is tested once a device, since some builds for some processors did not; where it fails, the
same codes are multiplied in floating point.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import nn

from qwodel.algorithms.hadamard import convrot_matrix, convrot_weight
from qwodel.algorithms.quant_types import INT8, ROW, TENSOR, Granularity
from qwodel.algorithms.scales import Quantized, quantize_matrix
from qwodel.exceptions import ConfigurationError, ValidationError
from qwodel.modules.int8_arithmetic import (
    RoundedInputs,
    int_mm_works,
    multiply,
    recall,
    remember,
    rescale,
    round_rows,
    rows_at_once,
    tensor_scale,
)

__all__ = ["Activations", "Int8Linear"]

Activations = Literal["token", "tensor", "static"]
"""What inputs are rounded with: a scale a token, one a call, or one that was calibrated."""


class Int8Linear(nn.Module):
    """``x → x Wᵀ + b`` for ``x`` ``[..., N]``, in INT8.

    Attributes:
        weight: int8 codes ``[M, N]``.
        weight_scale: fp32 ``[M, 1]``.
        input_scale: fp32 ``[1]`` of static activations, else ``None``.
        bias: ``[M]`` or ``None``.
        activations: what inputs are rounded with.
        rotation: size of the groups in which inputs are rotated first; the weight's columns were
            rotated alike (:func:`~qwodel.algorithms.hadamard.convrot_weight`). 0 does not rotate.
        exact: multiply integers; ``False`` multiplies what the codes stand for.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    bias: torch.Tensor | None
    hadamard: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        activations: Activations = "token",
        rotation: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if activations not in ("token", "tensor", "static"):
            raise ConfigurationError(f"activations are 'token', 'tensor' or 'static', not {activations!r}")
        if rotation and in_features % rotation:
            raise ConfigurationError(f"{in_features} inputs do not fall into groups of {rotation}")
        self.in_features, self.out_features = in_features, out_features
        self.activations, self.rotation = activations, rotation
        self.exact: bool | None = None
        self.register_buffer(
            "weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        )
        self.register_buffer("weight_scale", torch.ones(out_features, 1, dtype=torch.float32, device=device))
        static = torch.ones(1, dtype=torch.float32, device=device) if activations == "static" else None
        self.register_buffer("input_scale", static)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        self.register_buffer("hadamard", None, persistent=False)

    @classmethod
    def from_float(
        cls,
        linear: nn.Module,
        *,
        granularity: Granularity = ROW,
        activations: Activations = "token",
        input_scale: float | None = None,
        rotation: int = 0,
    ) -> Self:
        """Round a ``nn.Linear`` or a transformers ``Conv1D`` to the nearest codes.

        Args:
            linear: the layer; it is not changed.
            granularity: ``ROW`` or ``TENSOR``.
            input_scale: of static activations.
            rotation: rotate the weight's columns, and at run time the inputs.

        Raises:
            ConfigurationError: static activations without a scale.
            ValidationError: NaN or Inf among the weights.
        """
        weight = linear.weight
        if not isinstance(weight, torch.Tensor):
            raise ValidationError(f"{type(linear).__name__} has no weight matrix")
        matrix = weight.detach().T if type(linear).__name__ == "Conv1D" else weight.detach()
        if rotation:
            matrix = convrot_weight(matrix, rotation)
        codes = quantize_matrix(matrix.contiguous(), INT8, granularity)
        bias = linear.bias if isinstance(getattr(linear, "bias", None), torch.Tensor) else None
        return cls.from_codes(
            codes,
            bias=bias.detach() if isinstance(bias, torch.Tensor) else None,
            activations=activations,
            input_scale=input_scale,
            rotation=rotation,
            dtype=weight.dtype,
        )

    @classmethod
    def from_codes(
        cls,
        codes: Quantized,
        *,
        bias: torch.Tensor | None = None,
        activations: Activations = "token",
        input_scale: float | None = None,
        rotation: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """A layer of given codes, with scales of granularity ``ROW`` or ``TENSOR``.

        Raises:
            ConfigurationError: another granularity, or static activations without a scale.
        """
        if codes.quant_type != INT8 or codes.granularity not in (ROW, TENSOR):
            raise ConfigurationError(
                f"an INT8 product takes int8 codes with scales of rows or of the tensor, not {codes.granularity}"
            )
        if (activations == "static") != (input_scale is not None):
            raise ConfigurationError("static activations, and only they, need an input_scale")
        rows, columns = codes.codes.shape
        layer = cls(
            columns, rows, bias=bias is not None, activations=activations, rotation=rotation,
            dtype=dtype, device=codes.codes.device,
        )  # fmt: skip
        layer.weight = codes.codes.contiguous()
        layer.weight_scale = codes.scale.float().reshape(-1, 1).expand(rows, 1).contiguous()
        if layer.bias is not None and bias is not None:
            layer.bias = bias.to(dtype)
        if layer.input_scale is not None and input_scale is not None:
            layer.input_scale.fill_(input_scale)
        return layer

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., N]`` → ``[..., M]`` in the dtype of ``x``, without gradients."""
        rows = x.reshape(-1, self.in_features)
        if self.exact is None:
            self.exact = int_mm_works(x.device.type, x.device.index)
        step = rows_at_once(self.in_features, self.out_features)
        if len(rows) <= step:
            out = self._product(self._rounded(x, rows), x.dtype)
        else:
            turned = self._rotate(rows)
            scale = self._shared_scale(turned)
            parts = (round_rows(part, scale) for part in torch.split(turned, step))
            out = torch.cat([self._product(part, x.dtype) for part in parts])
        return out.reshape(*x.shape[:-1], self.out_features)

    def _rounded(self, x: torch.Tensor, rows: torch.Tensor) -> RoundedInputs:
        """The codes of ``x``: those it had in the layer before, if that read the same."""
        elsewhere = x.device.type != "cpu" or torch.compiler.is_compiling()
        key = None if elsewhere else (self.activations, self.rotation, self._static())
        if key is not None and (known := recall(x, key)) is not None:
            return known
        turned = self._rotate(rows)
        rounded = round_rows(turned, self._shared_scale(turned))
        if key is not None:
            remember(x, key, rounded)
        return rounded

    def _static(self) -> float | None:
        return None if self.input_scale is None else float(self.input_scale)

    def _product(self, rounded: RoundedInputs, dtype: torch.dtype) -> torch.Tensor:
        if self.exact:
            product = multiply(rounded.codes, self.weight, keep=False)
        else:
            product = rounded.codes.float() @ self.weight.float().T
        return rescale(product, rounded.scale, self.weight_scale.T, self.bias, dtype)

    def dequantize(self) -> torch.Tensor:
        """The weight the codes stand for, fp32 ``[M, N]``, in the basis the inputs come in."""
        weight = self.weight.float() * self.weight_scale
        return convrot_weight(weight, self.rotation) if self.rotation else weight

    def _rotate(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.rotation:
            return rows
        if self.hadamard is None or self.hadamard.device != rows.device or self.hadamard.dtype != rows.dtype:
            self.hadamard = convrot_matrix(self.rotation, rows.dtype).to(rows.device)
        return (rows.reshape(-1, self.rotation) @ self.hadamard).reshape(rows.shape)

    def _shared_scale(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The scale of all rows, ``[1, 1]``; ``None`` where each has its own."""
        if self.input_scale is not None:
            return self.input_scale.reshape(1, 1)
        return tensor_scale(rows) if self.activations == "tensor" and rows.numel() else None

    def extra_repr(self) -> str:
        """Sizes, and how inputs are rounded and rotated."""
        rotated = f", rotation={self.rotation}" if self.rotation else ""
        return f"{self.in_features}, {self.out_features}, activations={self.activations}{rotated}"
