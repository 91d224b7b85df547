from __future__ import annotations

import pytest
import torch

from qwodel.algorithms.quant_types import (
    FP8_E4M3,
    FP8_E5M2,
    INT8,
    QUANT_TYPES,
    ROW,
    TENSOR,
    Granularity,
    quant_type,
)
from qwodel.exceptions import ConfigurationError, ValidationError


@pytest.mark.parametrize("fp8", [FP8_E4M3, FP8_E5M2])
def test_fp8_constants_are_those_of_torch(fp8):
    limits = torch.finfo(fp8.dtype)
    assert (fp8.qmin, fp8.qmax) == (limits.min, limits.max)
    assert fp8.smallest_step == limits.smallest_normal * limits.eps
    assert fp8.bits == limits.bits


def test_int8_is_symmetric():
    assert (INT8.qmin, INT8.qmax, INT8.smallest_step) == (-127, 127, 1)


@pytest.mark.parametrize("which", QUANT_TYPES.values(), ids=str)
def test_types_are_found_by_name_and_dtype(which):
    assert quant_type(which.name) is which
    if not which.power_of_two_scales:  # a dtype alone says nothing of its scales
        assert quant_type(which.dtype) is which


def test_unknown_types_are_named():
    with pytest.raises(ConfigurationError, match="float16"):
        quant_type(torch.float16)
    with pytest.raises(ConfigurationError, match="int9") as caught:
        quant_type("int9")
    assert "int8" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("granularity", "text", "shape"),
    [
        (TENSOR, "tensor", ()),
        (ROW, "row", (5, 1)),
        (Granularity.group(4), "1x4", (5, 3)),
        (Granularity.block(4), "4x4", (2, 3)),
        (Granularity.group(100), "1x100", (5, 1)),
        (Granularity.block(1), "1x1", (5, 11)),
    ],
)
def test_granularity_round_trip_and_ragged_shapes(granularity, text, shape):
    assert str(granularity) == text
    assert Granularity.parse(text) == granularity
    assert granularity.scale_shape((5, 11)) == shape


def test_equal_granularities_hash_alike():
    assert len({Granularity.group(64), Granularity.parse("1×64"), Granularity(1, 64)}) == 1


@pytest.mark.parametrize("text", ["", "column", "2x4", "0x0", "1x0", "1x", "x64", "64"])
def test_bad_granularity_text(text):
    with pytest.raises(ConfigurationError):
        Granularity.parse(text)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "64"])
def test_bad_block_sizes(size):
    with pytest.raises(ConfigurationError):
        Granularity.group(size)
    with pytest.raises(ConfigurationError):
        Granularity.block(size)


def test_scales_belong_to_matrices():
    with pytest.raises(ValidationError, match=r"\[3, 4, 5\]"):
        ROW.scale_shape((3, 4, 5))
