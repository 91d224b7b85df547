"""Safetensors dtype names and the torch dtypes that hold them.

Format: https://huggingface.co/docs/safetensors. Sub-byte dtypes other than F4
have no torch dtype: their tensors can be copied as bytes but not computed with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from qwodel.exceptions import ValidationError
from qwodel.safetensors_files import DTYPE_BITS

__all__ = ["FLOAT_DTYPES", "TORCH_DTYPES", "dtype_name", "nbytes", "torch_dtype"]

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "I16": torch.int16, "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32,
    "I64": torch.int64, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F4": torch.float4_e2m1fn_x2,
}  # fmt: skip
"""Safetensors name → torch dtype. One ``float4_e2m1fn_x2`` element holds two F4 values."""

FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})
"""Dtypes whose values are weights as trained, with nothing to decode."""

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of the safetensors dtype ``name``.

    Raises:
        ValidationError: torch has no such dtype (F6_E2M3, F6_E3M2).
    """
    try:
        return TORCH_DTYPES[name]
    except KeyError:
        raise ValidationError(
            f"tensors of dtype {name} can be copied but not read as values: torch has no such dtype"
        ) from None


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype."""
    return _NAMES[dtype]


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes a tensor of safetensors dtype ``dtype`` and ``shape`` takes in a file."""
    return (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8
