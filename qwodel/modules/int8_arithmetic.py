"""The steps of an INT8 product on rows of inputs: round them, multiply integers, scale the sums.

On the CPU the steps write into memory that a thread keeps: pages that a large result of its own would
first have to be given cost as much time as the rounding. What an input was rounded to is remembered until
another one is rounded, because several layers (q, k and v, gate and up) read the same.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from qwodel.algorithms.quant_types import INT8

__all__ = [
    "RoundedInputs",
    "int8_product",
    "int_mm_works",
    "multiply",
    "recall",
    "remember",
    "rescale",
    "round_rows",
    "rows_at_once",
    "tensor_scale",
]

log = logging.getLogger(__name__)

_SMALLEST = 1e-12
_CUDA_ROWS = 17  # CUDA's operator takes more than 16 rows
_CUDA_MULTIPLE = 8
_AT_ONCE = 1 << 24
"""Numbers of the widest intermediate matrix; a thread keeps five bytes for each."""
_SMALL = 1 << 16  # numbers for which the loops below cost more than fresh memory
_IN_CACHE = 1 << 19  # numbers that are taken through all passes before the next


@dataclass(frozen=True, slots=True, eq=False)
class RoundedInputs:
    """Codes ``[T, N]``, valid until the thread rounds again, and their scales, fp32 ``[T, 1]`` or ``[1, 1]``."""

    codes: torch.Tensor
    scale: torch.Tensor


class _Scratch(threading.local):
    """Memory of a thread, by use; it grows with the largest request."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}
        self.last: tuple[weakref.ref[torch.Tensor], int, Hashable, RoundedInputs] | None = None

    def take(self, use: str, like: torch.Tensor, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
        if like.device.type != "cpu" or torch.compiler.is_compiling():
            return torch.empty(rows, columns, dtype=dtype, device=like.device)
        count = rows * columns
        if use not in self.kept or len(self.kept[use]) < count:
            self.kept.pop(use, None)
            # A tensor made under inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                self.kept[use] = torch.empty(count, dtype=dtype)
        return self.kept[use][:count].view(rows, columns)


_scratch = _Scratch()


def rows_at_once(columns: int, outputs: int) -> int:
    """Rows of inputs to work on together, so that intermediates stay of bounded size."""
    return max(_AT_ONCE // max(columns, outputs), 64)


def recall(x: torch.Tensor, key: Hashable) -> RoundedInputs | None:
    """What ``x`` was last rounded to under ``key``, if it was the last and has not changed since."""
    last = _scratch.last
    if last is None or x.is_inference() or last[0]() is not x:
        return None
    same = last[1] == x._version and last[2] == key  # noqa: SLF001  (a tensor changed in place is another input)
    return last[3] if same else None


def remember(x: torch.Tensor, key: Hashable, rounded: RoundedInputs) -> None:
    """Keep what :func:`recall` returns. Inference tensors have no version, so changes would go unseen."""
    if not x.is_inference():
        _scratch.last = (weakref.ref(x), x._version, key, rounded)  # noqa: SLF001


def round_rows(rows: torch.Tensor, scale: torch.Tensor | None = None) -> RoundedInputs:
    """Round ``rows`` ``[T, N]`` with ``scale``, fp32 ``[1, 1]``, or with one of each row's own."""
    count, columns = rows.shape
    _scratch.last = None  # its codes may be overwritten
    own = scale is None
    if rows.numel() <= _SMALL:
        scales = _row_scales(rows) if scale is None else scale
        values = torch.div(rows, scales).round_()
        return RoundedInputs((values if own else values.clamp_(-128, INT8.qmax)).to(torch.int8), scales)
    codes = _scratch.take("codes", rows, torch.int8, count, columns)
    scales = rows.new_empty(count, 1, dtype=torch.float32) if scale is None else scale
    step = _at_a_time(rows)
    work = _scratch.take("fp32", rows, torch.float32, min(step, count), columns)
    for start in range(0, count, step):
        part, part_scale = rows[start : start + step], scales
        if own:
            part_scale = scales[start : start + step].copy_(_row_scales(part))
        values = torch.div(part, part_scale, out=work[: len(part)]).round_()
        # Nothing in a row exceeds the row's own greatest value.
        codes[start : start + step].copy_(values if own else values.clamp_(-128, INT8.qmax))
    return RoundedInputs(codes, scales)


def _at_a_time(matrix: torch.Tensor) -> int:
    """Rows that stay in a processor's cache; a GPU takes all."""
    count, columns = matrix.shape
    return count if matrix.device.type != "cpu" else max(_IN_CACHE // columns, 1)


def _row_scales(rows: torch.Tensor) -> torch.Tensor:
    return rows.abs().amax(dim=1, keepdim=True).float().div_(INT8.qmax).clamp_(min=_SMALLEST)


def tensor_scale(rows: torch.Tensor) -> torch.Tensor:
    """One scale for all rows, fp32 ``[1, 1]``."""
    return (rows.abs().amax().float() / INT8.qmax).clamp_(min=_SMALLEST).reshape(1, 1)


def rescale(
    product: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``product · scale · weight_scale + bias`` in ``dtype``, computed in fp32.

    Args:
        product: ``[T, M]``, int32 or floating point.
        scale: of the inputs, ``[T, 1]`` or ``[1, 1]``.
        weight_scale: ``[1, M]``.
        bias: ``[M]``.
    """
    count, outputs = product.shape
    if product.numel() <= _SMALL:
        values = torch.mul(product, scale).mul_(weight_scale)
        return (values if bias is None else values.add_(bias)).to(dtype)
    out = torch.empty(count, outputs, dtype=dtype, device=product.device)
    step = _at_a_time(product)
    work = _scratch.take("fp32", product, torch.float32, min(step, count), outputs)
    for start in range(0, count, step):
        part = product[start : start + step]
        part_scale = scale if len(scale) == 1 else scale[start : start + step]
        values = torch.mul(part, part_scale, out=work[: len(part)]).mul_(weight_scale)
        if bias is not None:
            values.add_(bias)
        out[start : start + step].copy_(values)
    return out


def int8_product(codes: torch.Tensor, weight: torch.Tensor, *, exact: bool | None = None) -> torch.Tensor:
    """``codes @ weightᵀ`` of int8 ``[T, N]`` and ``[M, N]``: int32, or fp32 where integers do not multiply.

    Args:
        exact: multiply integers; tried once a device where ``None``.
    """
    if exact is None:
        exact = int_mm_works(codes.device.type, codes.device.index)
    return multiply(codes, weight) if exact else codes.float() @ weight.float().T


def multiply(codes: torch.Tensor, weight: torch.Tensor, *, keep: bool = True) -> torch.Tensor:
    """``codes @ weightᵀ`` in int32, padded to the shapes that the operators take.

    Args:
        keep: ``False`` gives a result that is valid until the thread multiplies again.
    """
    rows, columns, outputs = codes.shape[0], codes.shape[1], weight.shape[0]
    if codes.device.type != "cuda":
        if columns == 1:
            # The operator takes the transpose of a single column for what it is not, and computes nonsense.
            codes, weight = nn.functional.pad(codes, (0, 1)), nn.functional.pad(weight, (0, 1))
        if keep:
            return torch._int_mm(codes, weight.t())  # noqa: SLF001  (the public name of this operator)
        out = _scratch.take("int32", codes, torch.int32, rows, outputs)
        return torch._int_mm(codes, weight.t(), out=out)  # noqa: SLF001
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
            found = multiply(a.to(where), b.to(where)).cpu()
        except (RuntimeError, NotImplementedError) as error:
            log.warning(
                "INT8 products do not run on %s (%s): codes are multiplied in floating point", where, error
            )
            return False
        if not torch.equal(found.long(), a.long() @ b.long().T):
            log.warning("INT8 products are wrong on %s: codes are multiplied in floating point", where)
            return False
    return True
