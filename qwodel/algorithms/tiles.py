"""Walk a matrix in row chunks that fit a core's cache, aligned with its scale groups.

Whatever is computed per chunk depends on the chunk's own rows only, and sums run over
fixed pieces, so results have the same bits for any chunk size and any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from qwodel.algorithms.quant_types import Granularity
from qwodel.exceptions import ValidationError

__all__ = [
    "CHUNK_ELEMENTS",
    "check_finite",
    "check_matrix",
    "expand_scale",
    "group_amax",
    "group_sum",
    "row_chunks",
]

CHUNK_ELEMENTS = 1 << 17
"""Weights in a chunk: 512 KiB as fp32, so that a chunk's temporaries stay in the second-level cache."""

_SUM_COLUMNS = 1 << 14  # torch splits a longer single sum among threads, in an order of its own


def row_chunks(
    shape: torch.Size | tuple[int, ...], granularity: Granularity, elements: int = CHUNK_ELEMENTS
) -> Iterator[slice]:
    """Row slices of about ``elements`` weights that never cut a block in two."""
    rows, cols = shape
    step = max(1, elements // max(1, cols))
    if granularity.block_rows > 1:
        step = max(granularity.block_rows, step // granularity.block_rows * granularity.block_rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def scale_rows(rows: slice, granularity: Granularity) -> slice:
    """The rows of the scale tensor that belong to a chunk of rows (not for TENSOR)."""
    size = granularity.block_rows
    return slice(rows.start // size, -(-rows.stop // size))


def expand_scale(scale: torch.Tensor, granularity: Granularity, rows: slice, cols: int) -> torch.Tensor:
    """The scale of a chunk of rows, broadcastable to ``[rows, cols]``."""
    if not granularity.block_rows:
        return scale
    part = scale[scale_rows(rows, granularity)]
    return _spread(part, granularity, rows.stop - rows.start, cols)


def _spread(groups: torch.Tensor, granularity: Granularity, rows: int, cols: int) -> torch.Tensor:
    if granularity.block_rows > 1:
        groups = groups.repeat_interleave(granularity.block_rows, dim=0)[:rows]
    if granularity.block_cols:
        groups = groups.repeat_interleave(granularity.block_cols, dim=1)[:, :cols]
    return groups


def column_blocks(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """``[R, N]`` → ``[R, blocks, columns]``, padded with zeros where the last block is ragged."""
    cols = x.shape[1]
    size = granularity.block_cols or max(cols, 1)
    if cols % size:
        x = pad(x, (0, size - cols % size))
    blocks = x.shape[1] // size if granularity.is_block else 1
    return x.reshape(x.shape[0], blocks, size) if cols else x.new_zeros(x.shape[0], blocks, size)


def _row_blocks(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """``[R, blocks]`` → ``[R/bs, bs, blocks]``, padded with zeros."""
    size = granularity.block_rows
    if x.shape[0] % size:
        x = pad(x, (0, 0, 0, size - x.shape[0] % size))
    return x.reshape(x.shape[0] // size, size, x.shape[1])


def group_amax(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """Greatest element of each group of a non-negative chunk; TENSOR is answered per row, ``[R, 1]``."""
    peak = column_blocks(x, granularity).amax(dim=2)
    return _row_blocks(peak, granularity).amax(dim=1) if granularity.block_rows > 1 else peak


def group_sum(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """Sum of each group of a chunk, fp64; TENSOR is answered per row, ``[R, 1]``."""
    pieces = [piece.sum(dim=2) for piece in torch.split(column_blocks(x, granularity), _SUM_COLUMNS, dim=2)]
    total = torch.stack([piece.double() for piece in pieces]).sum(dim=0)
    return _row_blocks(total, granularity).sum(dim=1) if granularity.block_rows > 1 else total


def check_matrix(weight: torch.Tensor) -> None:
    """Refuse what is not a real floating-point matrix.

    Raises:
        ValidationError: the tensor has not two dimensions or is not floating-point.
    """
    if weight.ndim != 2:
        raise ValidationError(f"a weight of shape {list(weight.shape)} is not a matrix")
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValidationError(
            f"cannot quantize a weight of {weight.dtype}; it must be bf16, fp16, fp32 or fp64"
        )


def check_finite(weight: torch.Tensor, what: str = "the weight") -> None:
    """Refuse NaN and Inf, saying how many of each there are.

    Raises:
        ValidationError: something is not finite.
    """
    nan = int(weight.isnan().sum())
    inf = int(weight.isinf().sum())
    if nan or inf:
        found = " and ".join(f"{count} {name}" for count, name in ((nan, "NaN"), (inf, "Inf")) if count)
        raise ValidationError(
            f"{what} holds {found} among {weight.numel()} values",
            hint="keep this tensor in its original dtype, or repair the source",
        )


def sum_rows(x: torch.Tensor) -> torch.Tensor:
    """Sum of per-row results ``[M, 1]`` to a 0-d tensor, always in the same order."""
    return torch.stack([piece.sum() for piece in torch.split(x.flatten(), _SUM_COLUMNS)]).cumsum(0)[-1]
