"""Hypothesis strategies and independent reference formulas shared by the tests of this folder."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from qwodel.algorithms.quant_types import QUANT_TYPES, ROW, TENSOR, Granularity

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]

granularities = st.one_of(
    st.sampled_from([TENSOR, ROW]),
    st.sampled_from([1, 2, 3, 5, 8, 64]).map(Granularity.group),
    st.sampled_from([1, 2, 3, 5, 8, 64]).map(Granularity.block),
)
FREELY_SCALED = [each for each in QUANT_TYPES.values() if not each.power_of_two_scales]
"""Types whose scales are any fp32 number."""

quant_types = st.sampled_from(FREELY_SCALED)


@st.composite
def weights(draw: st.DrawFn, least: int = 0) -> torch.Tensor:
    """Matrices of many shapes, types and sizes, with zeros, dead rows and subnormals."""
    rows = draw(st.sampled_from([n for n in (0, 1, 2, 7, 13, 32, 41) if n >= least]))
    cols = draw(st.sampled_from([n for n in (0, 1, 3, 11, 16, 37, 64) if n >= least]))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    limits = torch.finfo(dtype)
    size = draw(st.sampled_from([1.0, 1e-3, "huge", "subnormal"]))
    if size == "huge":
        weight = weight.clamp(-4, 4) * (min(limits.max, torch.finfo(torch.float32).max) / 8)
    elif size == "subnormal":
        weight = weight * limits.tiny / 8
    else:
        weight = weight * size
    if rows and draw(st.booleans()):
        weight[draw(st.integers(0, rows - 1))] = 0
    if draw(st.integers(0, 9)) == 0:
        weight.zero_()
    return weight.to(dtype)


def spread(scale: torch.Tensor, granularity: Granularity, shape: tuple[int, ...]) -> torch.Tensor:
    """The scale of every single weight, by plain indexing."""
    out = torch.empty(shape, dtype=scale.dtype)
    for i in range(shape[0]):
        for j in range(shape[1]):
            if granularity == TENSOR:
                out[i, j] = scale
            else:
                block = granularity.block_cols
                out[i, j] = scale[i // granularity.block_rows, j // block if block else 0]
    return out


def grid_of(quant_type) -> torch.Tensor:
    """Every finite value of a type in use, ascending, fp64."""
    if quant_type.is_float:
        values = torch.arange(256, dtype=torch.uint8).view(quant_type.dtype).double()
        return values[values.isfinite()].unique()
    return torch.arange(quant_type.qmin, quant_type.qmax + 1, dtype=torch.float64)
