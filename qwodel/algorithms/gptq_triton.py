"""GPTQ's inner loop as one Triton kernel: a block of columns stays on the chip while it is rounded.

The same arithmetic as :func:`~qwodel.algorithms.gptq_columns.solve_block` in the same order, so the same
codes: division rounds correctly, and products are rounded before they are subtracted.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from qwodel.algorithms.gptq_columns import solve_block
from qwodel.algorithms.quant_types import QuantType

__all__ = ["solve_block_triton"]

_MAX_COLUMNS = 128  # more would spill registers
_ROWS = 32  # rows a program holds


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    columns,
    factor,
    scales,
    rounded,
    errors,
    rows,
    count,
    stride_factor,
    stride_scale,
    stride_scale_row,
    qmin,
    qmax,
    smallest,
    anchor,
    IS_FLOAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLUMNS)
    row_ok = row < rows
    at = col[:, None] * rows + row[None, :]
    ok = (col[:, None] < count) & row_ok[None, :]
    block = tl.load(columns + at, mask=ok, other=0.0)
    for i in range(count):
        here = col[:, None] == i
        value = tl.sum(tl.where(here, block, 0.0), axis=0)
        scale = tl.load(scales + i * stride_scale + row * stride_scale_row, mask=row_ok, other=1.0)
        x = tl.div_rn(value, scale)
        if IS_FLOAT:
            x = tl.minimum(tl.maximum(x, qmin), qmax)
            power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            big = tl.maximum(power, smallest) * anchor
        else:
            big = anchor
        x = (x + big) - big
        x = tl.minimum(tl.maximum(x, qmin), qmax)
        code = x * scale
        pivot = tl.load(factor + i * stride_factor + i)
        error = tl.div_rn(value - code, pivot)
        tl.store(rounded + i * rows + row, code, mask=row_ok)
        tl.store(errors + i * rows + row, error, mask=row_ok)
        spread = tl.load(factor + i * stride_factor + col, mask=(col > i) & (col < count), other=0.0)
        block = block - spread[:, None] * error[None, :]


def solve_block_triton(
    columns: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, quant_type: QuantType
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`~qwodel.algorithms.gptq_columns.solve_block` on a CUDA device, or in Triton's interpreter.

    Computes in fp32; what the kernel cannot hold goes to the ordinary loop.

    Args:
        columns: fp32 ``[b, M]``, b at most 128.
        factor: ``[b, b]``.
        scales: ``[b, M]`` or ``[b, 1]``.

    Returns:
        the weights the codes stand for, and the errors divided by U_ii, each ``[b, M]``.
    """
    count, rows = columns.shape
    runs = columns.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if not runs or count > _MAX_COLUMNS or columns.dtype != torch.float32:
        return solve_block(columns, factor, scales, quant_type)
    columns, factor = columns.contiguous(), factor.contiguous()
    rounded, errors = torch.empty_like(columns), torch.empty_like(columns)
    # Adding 1.5·2²³ times the grid's step makes the FPU round to even at that step.
    anchor = 1.5 * 2.0 ** (23 - quant_type.mantissa_bits)
    settings: dict[str, Any] = {"IS_FLOAT": quant_type.is_float, "ROWS": _ROWS}
    settings["COLUMNS"] = max(16, triton.next_power_of_2(count))
    if columns.is_cuda:
        settings["enable_fp_fusion"] = False
    _kernel[(triton.cdiv(rows, _ROWS),)](
        columns,
        factor,
        scales,
        rounded,
        errors,
        rows,
        count,
        factor.stride(0),
        scales.stride(0),
        scales.stride(1) if scales.shape[1] > 1 else 0,
        quant_type.qmin,
        quant_type.qmax,
        2.0**quant_type.min_exponent,
        anchor,
        **settings,
    )
    return rounded, errors
