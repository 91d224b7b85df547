"""What a code is and which weights share a scale: two value objects that name everything once.

A quantized matrix is ``codes`` of a :class:`QuantType` and an fp32 *dequant* scale,
``w ≈ code · scale``, shared by the groups a :class:`Granularity` draws. Weights are
``[M, N] = [out_features, in_features]`` throughout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from qwodel.exceptions import ConfigurationError, ValidationError, did_you_mean

__all__ = [
    "FP8_E4M3",
    "FP8_E5M2",
    "INT4",
    "INT6",
    "INT8",
    "INT16",
    "MXFP8_E4M3",
    "QUANT_TYPES",
    "ROW",
    "TENSOR",
    "Granularity",
    "QuantType",
    "quant_type",
]


@dataclass(frozen=True, slots=True)
class QuantType:
    """A symmetric number format for weights.

    Attributes:
        name: the name in recipes and manifests, such as ``"int8"``.
        bits: bits per code.
        dtype: the torch dtype that stores a code.
        qmin, qmax: the least and the greatest code in use, as values.
        is_float: codes are floating-point numbers (a non-uniform grid).
        mantissa_bits: explicit mantissa bits; 0 for integers.
        min_exponent: exponent of the smallest normal number; 0 for integers.
        power_of_two_scales: its dequant scales are powers of two.
    """

    name: str
    bits: int
    dtype: torch.dtype
    qmin: float
    qmax: float
    is_float: bool = False
    mantissa_bits: int = 0
    min_exponent: int = 0
    power_of_two_scales: bool = False

    @property
    def smallest_step(self) -> float:
        """Distance between the two codes nearest to zero (1 for integers)."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    def __str__(self) -> str:
        return self.name


INT8 = QuantType("int8", 8, torch.int8, -127, 127)
"""Symmetric int8; −128 is never used, so that negation is exact."""

INT4 = QuantType("int4", 4, torch.int8, -7, 7)
INT6 = QuantType("int6", 6, torch.int8, -31, 31)
INT16 = QuantType("int16", 16, torch.int16, -32767, 32767)

FP8_E4M3 = QuantType(
    "float8_e4m3fn", 8, torch.float8_e4m3fn, -448, 448, is_float=True, mantissa_bits=3, min_exponent=-6
)
"""OCP FP8 E4M3 (finite, no infinities): https://arxiv.org/abs/2209.05433."""

FP8_E5M2 = QuantType(
    "float8_e5m2", 8, torch.float8_e5m2, -57344, 57344, is_float=True, mantissa_bits=2, min_exponent=-14
)
"""OCP FP8 E5M2; its infinities are never produced."""

MXFP8_E4M3 = replace(FP8_E4M3, name="mxfp8_e4m3", power_of_two_scales=True)
"""OCP Microscaling's E4M3, whose scales are exponents (E8M0)."""

QUANT_TYPES = {q.name: q for q in (INT8, FP8_E4M3, FP8_E5M2, MXFP8_E4M3)}
"""What checkpoints are converted to, by name; INT4, INT6 and INT16 are for modules that compute with them."""


def quant_type(which: str | torch.dtype) -> QuantType:
    """The :class:`QuantType` of a name (``"int8"``) or a storage dtype (``torch.int8``).

    Raises:
        ConfigurationError: nothing has that name or dtype.
    """
    if isinstance(which, torch.dtype):
        for candidate in QUANT_TYPES.values():
            if candidate.dtype == which:
                return candidate
    elif which in QUANT_TYPES:
        return QUANT_TYPES[which]
    raise ConfigurationError(
        f"no quantized type is called {which!s}; there are {', '.join(QUANT_TYPES)}",
        hint=did_you_mean(str(which).removeprefix("torch."), QUANT_TYPES),
    )


@dataclass(frozen=True, slots=True)
class Granularity:
    """Which weights share one scale: ``block_rows × block_cols`` of them; 0 means all.

    Blocks that do not divide the matrix are ragged: the last block of a row or a column
    simply holds what is left. Build one with :data:`TENSOR`, :data:`ROW`,
    :meth:`group` or :meth:`block`, or from text with :meth:`parse`.
    """

    block_rows: int
    block_cols: int

    def __post_init__(self) -> None:
        bs = self.block_cols
        if bs < 0 or (self.block_rows, bs) not in {(0, 0), (1, 0), (1, bs), (bs, bs)}:
            raise ConfigurationError(
                f"no granularity of {self.block_rows}×{bs} weights",
                hint="use TENSOR, ROW, Granularity.group(n) for 1×n or Granularity.block(n) for n×n",
            )

    @classmethod
    def group(cls, size: int) -> Granularity:
        """One scale for ``size`` neighbouring weights of a row (1×size)."""
        return cls(1, _positive(size))

    @classmethod
    def block(cls, size: int) -> Granularity:
        """One scale for a square of ``size × size`` weights."""
        return cls(_positive(size), _positive(size))

    @classmethod
    def parse(cls, text: str) -> Granularity:
        """The granularity that ``str()`` writes: ``tensor``, ``row``, ``1x64``, ``128x128``.

        Raises:
            ConfigurationError: the text is none of these.
        """
        word = text.strip().lower().replace("×", "x")
        if word in _NAMED:
            return _NAMED[word]
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word)
        if match is None:
            raise ConfigurationError(
                f"{text!r} is no granularity", hint="write tensor, row, 1x64 (groups) or 128x128 (blocks)"
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def is_block(self) -> bool:
        """Whether scales repeat along the columns (1×bs or bs×bs)."""
        return self.block_cols > 0

    def scale_shape(self, weight_shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
        """Shape of the scale of a ``[M, N]`` weight.

        ``()`` for TENSOR, ``(M, 1)`` for ROW, ``(M, ⌈N/bs⌉)`` for 1×bs and
        ``(⌈M/bs⌉, ⌈N/bs⌉)`` for bs×bs.

        Raises:
            ValidationError: the weight is not a matrix.
        """
        if len(weight_shape) != 2:
            raise ValidationError(f"a weight of shape {list(weight_shape)} is not a matrix")
        rows, cols = weight_shape
        if not self.block_rows:
            return ()
        if not self.block_cols:
            return (rows, 1)
        return (-(-rows // self.block_rows), -(-cols // self.block_cols))

    def __str__(self) -> str:
        for name, value in _NAMED.items():
            if self == value:
                return name
        return f"{self.block_rows}x{self.block_cols}"


def _positive(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigurationError(f"a block size is a positive whole number, not {size!r}")
    return size


TENSOR = Granularity(0, 0)
"""One scale for the whole matrix."""

ROW = Granularity(1, 0)
"""One scale for each output feature."""

_NAMED = {"tensor": TENSOR, "row": ROW}
