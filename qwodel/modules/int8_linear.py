"""A linear layer whose weights are INT8 and whose product is an integer one.

``y = (x_q W_qᵀ) · s_x · s_w + b`` with x rounded token by token, as a whole, or with a static scale.
The product is ``torch._int_mm``, on the CPU and on CUDA. Whether that operator computes what it
should is tested once a device, since some builds for some processors did not; where it fails, the
same codes are multiplied in floating point.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal, Self

import torch
from torch import nn

from qwodel.algorithms.hadamard import convrot_matrix, convrot_weight
from qwodel.algorithms.quant_types import INT8, ROW, TENSOR, Granularity
from qwodel.algorithms.scales import Quantized, quantize
from qwodel.exceptions import ConfigurationError, ValidationError

__all__ = ["Activations", "Int8Linear", "int8_product", "int_mm_works"]

log = logging.getLogger(__name__)

Activations = Literal["token", "tensor", "static"]
"""What inputs are rounded with: a scale a token, one a call, or one that was calibrated."""

_SMALLEST = 1e-12
_CUDA_ROWS = 17  # CUDA's operator takes more than 16 rows
_CUDA_MULTIPLE = 8


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
        self.register_buffer("weight_scale", torch.ones(out_features, 1, device=device))
        static = torch.ones(1, device=device) if activations == "static" else None
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
        codes = quantize(matrix.contiguous(), INT8, granularity)
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., N]`` → ``[..., M]`` in the dtype of ``x``."""
        rows = x.reshape(-1, self.in_features)
        if self.rotation:
            rows = self._rotate(rows)
        codes, scale = self._round(rows)
        if self.exact is None:
            self.exact = int_mm_works(codes.device.type, codes.device.index)
        product = int8_product(codes, self.weight, exact=self.exact).float()
        out = product.mul_(scale).mul_(self.weight_scale.T)
        if self.bias is not None:
            out.add_(self.bias)
        return out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def dequantize(self) -> torch.Tensor:
        """The weight the codes stand for, fp32 ``[M, N]``, in the basis the inputs come in."""
        weight = self.weight.float() * self.weight_scale
        return convrot_weight(weight, self.rotation) if self.rotation else weight

    def _rotate(self, rows: torch.Tensor) -> torch.Tensor:
        if self.hadamard is None or self.hadamard.device != rows.device or self.hadamard.dtype != rows.dtype:
            self.hadamard = convrot_matrix(self.rotation, rows.dtype).to(rows.device)
        return (rows.reshape(-1, self.rotation) @ self.hadamard).reshape(rows.shape)

    def _round(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``[T, N]`` and their scales ``[T, 1]`` or ``[1]``."""
        if self.input_scale is not None:
            scale = self.input_scale
        elif self.activations == "tensor":
            scale = (rows.abs().amax().float() / INT8.qmax).clamp_(min=_SMALLEST).reshape(1)
        else:
            scale = (rows.abs().amax(dim=1, keepdim=True).float() / INT8.qmax).clamp_(min=_SMALLEST)
        codes = torch.div(rows.float(), scale).round_().clamp_(-128, INT8.qmax).to(torch.int8)
        return codes, scale

    def extra_repr(self) -> str:
        rotated = f", rotation={self.rotation}" if self.rotation else ""
        return f"{self.in_features}, {self.out_features}, activations={self.activations}{rotated}"


def int8_product(codes: torch.Tensor, weight: torch.Tensor, *, exact: bool | None = None) -> torch.Tensor:
    """``codes @ weightᵀ`` of int8 ``[T, N]`` and ``[M, N]``: int32, or fp32 where integers do not multiply.

    Args:
        exact: multiply integers; tried once a device where ``None``.
    """
    if exact is None:
        exact = int_mm_works(codes.device.type, codes.device.index)
    return _multiply(codes, weight) if exact else codes.float() @ weight.float().T


def _multiply(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``codes @ weightᵀ`` in int32, padded to the shapes that CUDA's operator takes."""
    if codes.device.type != "cuda":
        if codes.shape[1] == 1:
            # The operator takes the transpose of a single column for what it is not, and computes nonsense.
            codes, weight = nn.functional.pad(codes, (0, 1)), nn.functional.pad(weight, (0, 1))
        return torch._int_mm(codes, weight.t())  # noqa: SLF001  (the public name of this operator)
    rows, columns, outputs = codes.shape[0], codes.shape[1], weight.shape[0]
    more = max(_CUDA_ROWS - rows, 0), -columns % _CUDA_MULTIPLE, -outputs % _CUDA_MULTIPLE
    if any(more):
        codes = nn.functional.pad(codes, (0, more[1], 0, more[0]))
        weight = nn.functional.pad(weight, (0, more[1], 0, more[2]))
    return torch._int_mm(codes, weight.t())[:rows, :outputs]  # noqa: SLF001


@cache
def int_mm_works(device: str, index: int | None = None) -> bool:
    """Whether ``torch._int_mm`` computes exact products on a device; tried once, on several shapes."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, outputs in ((1, 64, 48), (5, 576, 96), (33, 128, 65), (64, 1536, 64)):
        a = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
        b = torch.randint(-127, 128, (outputs, columns), generator=generator).to(torch.int8)
        a[0], b[0] = -128, 127  # the largest sums
        where = torch.device(device, index) if index is not None else torch.device(device)
        try:
            found = _multiply(a.to(where), b.to(where)).cpu()
        except (RuntimeError, NotImplementedError) as error:
            log.warning(
                "INT8 products do not run on %s (%s): codes are multiplied in floating point", where, error
            )
            return False
        if not torch.equal(found.long(), a.long() @ b.long().T):
            log.warning("INT8 products are wrong on %s: codes are multiplied in floating point", where)
            return False
    return True
