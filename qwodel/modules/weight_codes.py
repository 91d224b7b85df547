"""A weight matrix as a module: codes, scales and zero points, two codes a byte where they are that small."""

from __future__ import annotations

import torch
from torch import nn

from qwodel.algorithms.fp8_decode import codes_to_float
from qwodel.algorithms.quant_types import QuantType
from qwodel.exceptions import ValidationError

__all__ = ["WeightCodes", "pack_nibbles", "unpack_nibbles"]


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes from −8 to 7, ``[M, N]`` → ``[M, ⌈N/2⌉]`` bytes; an even column lies in the low four bits."""
    if codes.shape[1] % 2:
        codes = nn.functional.pad(codes, (0, 1))
    low, high = codes[:, 0::2].to(torch.uint8) & 15, codes[:, 1::2].to(torch.uint8) & 15
    return low | high << 4


def unpack_nibbles(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The int8 codes ``[M, columns]`` that :func:`pack_nibbles` packed."""
    # Shifting up first makes the shift down extend the sign.
    low, high = (packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4
    return torch.stack((low, high), dim=2).flatten(1)[:, :columns].contiguous()


class WeightCodes(nn.Module):
    """``[M, N]`` weights, ``(code − zero) · scale``, with a scale for each row of each group of columns.

    Attributes:
        codes: of the type's dtype, ``[M, N]``; ``[M, ⌈N/2⌉]`` bytes of four-bit types; the weights
            themselves where they stay floating point.
        scale: fp32 ``[M, G]``; ``None`` where weights stay floating point.
        zero_point: fp32 whole numbers ``[M, G]``, or ``None``.
        sizes: columns of each group.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None
    zero_point: torch.Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        quant_type: QuantType | None,
        sizes: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        asymmetric: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        rows, columns = shape
        if sum(sizes) != columns:
            raise ValidationError(f"groups of {sizes} columns do not make {columns}")
        self.shape, self.quant_type, self.sizes = shape, quant_type, sizes
        self.packed = quant_type is not None and quant_type.bits == 4
        stored = (rows, -(-columns // 2)) if self.packed else shape
        kind = torch.uint8 if self.packed else (quant_type.dtype if quant_type else dtype)
        self.register_buffer("codes", torch.zeros(stored, dtype=kind, device=device))
        groups = torch.ones(rows, len(sizes), dtype=torch.float32, device=device)
        self.register_buffer("scale", groups if quant_type else None)
        self.register_buffer("zero_point", groups * 0 if asymmetric else None)

    @classmethod
    def of(
        cls,
        codes: torch.Tensor,
        quant_type: QuantType | None,
        scale: torch.Tensor | None,
        sizes: tuple[int, ...],
        zero_point: torch.Tensor | None = None,
    ) -> WeightCodes:
        """Codes ``[M, N]`` with scales that broadcast to ``[M, G]``."""
        rows, columns = codes.shape
        made = cls(
            (rows, columns), quant_type, sizes,
            dtype=codes.dtype, asymmetric=zero_point is not None, device="meta",
        )  # fmt: skip
        made.codes = pack_nibbles(codes) if made.packed else codes.contiguous()
        if scale is not None:
            made.scale = scale.float().expand(rows, len(sizes)).contiguous()
        if zero_point is not None:
            made.zero_point = zero_point.float().expand(rows, len(sizes)).contiguous()
        return made

    def integers(self) -> torch.Tensor:
        """The codes as stored integers or FP8 numbers, ``[M, N]``."""
        return unpack_nibbles(self.codes, self.shape[1]) if self.packed else self.codes

    def values(self) -> torch.Tensor:
        """The weights, fp32 ``[M, N]``."""
        if self.scale is None:
            return self.codes.float()
        numbers = codes_to_float(self.integers()).float()
        if self.zero_point is not None:
            numbers = numbers - self._spread(self.zero_point)
        return numbers * self._spread(self.scale)

    def scale_rows(self, factors: torch.Tensor) -> None:
        """Multiply each row by a number ``[M]``: exact, since scales take it."""
        if self.scale is not None:
            self.scale = self.scale * factors[:, None].to(self.scale)
        else:
            self.codes = (self.codes.double() * factors[:, None].double()).to(self.codes.dtype)

    def _spread(self, groups: torch.Tensor) -> torch.Tensor:
        if len(self.sizes) == 1:
            return groups
        sizes = torch.tensor(self.sizes, device=groups.device)
        return groups.repeat_interleave(sizes, dim=1, output_size=self.shape[1])

    def extra_repr(self) -> str:
        """Shape, what a code is, and the number of groups of columns."""
        return f"{list(self.shape)}, {self.quant_type or self.codes.dtype}, {len(self.sizes)} groups"
