"""Simulated quantization against formulas written out with numpy, and never in place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qwodel.smoothquant as sq
from qwodel.exceptions import ConfigurationError, ValidationError
from qwodel.smoothquant.fake_quant import fake_quantize, quantization_scales

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 30.0] * 8) + 0.7


def symmetric(x: np.ndarray, axis: int | tuple[int, ...] | None, bits: int = 8) -> np.ndarray:
    scale = np.abs(x).max(axis=axis, keepdims=axis is not None) / (2 ** (bits - 1) - 1)
    return np.round(x / scale) * scale


def asymmetric(x: np.ndarray, axis: int | tuple[int, ...] | None, bits: int = 8) -> np.ndarray:
    low = np.minimum(x.min(axis=axis, keepdims=axis is not None), 0)
    high = np.maximum(x.max(axis=axis, keepdims=axis is not None), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-(2 ** (bits - 1)) - low / scale)
    codes = np.clip(np.round(x / scale) + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes - zero) * scale


CASES: list[tuple[str, Callable[..., np.ndarray], int | tuple[int, ...] | None]] = [
    ("activation_per_token_symmetric", symmetric, -1),
    ("activation_per_token_asymmetric", asymmetric, -1),
    ("activation_per_channel_symmetric", symmetric, (0, 1)),
    ("activation_per_channel_asymmetric", asymmetric, (0, 1)),
    ("activation_per_tensor_symmetric", symmetric, None),
    ("activation_per_tensor_asymmetric", asymmetric, None),
    ("weight_per_channel_symmetric", symmetric, -1),
    ("weight_per_channel_asymmetric", asymmetric, -1),
    ("weight_per_tensor_symmetric", symmetric, None),
    ("weight_per_tensor_asymmetric", asymmetric, None),
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("name", "formula", "axis"), CASES, ids=[case[0] for case in CASES])
def test_every_granularity_is_its_formula(
    name: str, formula: Callable[..., np.ndarray], axis: int | tuple[int, ...] | None, bits: int
) -> None:
    x = X.reshape(15, 16) if name.startswith("weight") else X
    axis = 0 if axis == (0, 1) and x.ndim == 2 else axis
    before = x.clone()
    found = getattr(sq, f"fake_quantize_{name}")(x, n_bits=bits)
    expected = formula(x.double().numpy(), axis, bits)
    assert found.dtype == x.dtype
    assert found.shape == x.shape
    # A value at the border between two codes may round either way in fp32.
    step = np.abs(expected).max() / (2 ** (bits - 1) - 1)
    differing = np.abs(found.numpy() - expected) > 1e-4 * step
    assert differing.mean() < 0.01
    assert torch.equal(x, before)


def test_static_scales_of_the_spec() -> None:
    activation = torch.tensor([[0.0, 1.0, -3.0], [10.0, 5.0, 2.0]])
    scales = torch.tensor([0.5, 0.1])
    found = sq.fake_quantize_activation_per_token_asymmetric(activation, scales)
    # The second token's least value is above zero: its zero point is −128, and 100 codes reach 10.
    assert torch.allclose(found, torch.tensor([[0.0, 1.0, -3.0], [10.0, 5.0, 2.0]]))
    clipped = sq.fake_quantize_activation_per_token_asymmetric(activation, torch.tensor([0.001, 0.001]))
    assert float(clipped[1, 0]) == pytest.approx(0.255)
    weight = torch.tensor([[1.0, -2.0], [0.3, 0.04]])
    found = sq.fake_quantize_weight_per_channel_symmetric(weight, torch.tensor([0.5, 0.1]))
    assert torch.allclose(found, torch.tensor([[1.0, -2.0], [0.3, 0.0]]))
    static = sq.fake_quantize_activation_per_tensor_asymmetric(
        activation, torch.tensor(0.1), torch.tensor(-98.0)
    )
    assert torch.allclose(static, activation)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 12),
    st.sampled_from(["rows", "columns", "tensor"]),
    st.booleans(),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=12, max_size=12),
)
def test_errors_stay_within_half_a_step(
    bits: int, grouping: str, is_symmetric: bool, values: list[float]
) -> None:
    x = torch.tensor(values).reshape(3, 4)
    scales = quantization_scales(x, grouping, n_bits=bits, symmetric=is_symmetric)  # type: ignore[arg-type]
    found = fake_quantize(x, grouping, n_bits=bits, symmetric=is_symmetric)  # type: ignore[arg-type]
    step = scales[:, None] if grouping == "rows" else scales
    # A rounded zero point shifts the range by up to half a step, which clips as much at one end.
    bound = 0.5 if is_symmetric else 1.0
    assert bool(((found - x).abs() <= step * (bound + 1e-3) + 1e-6).all())


def test_half_precision_stays_half_and_zeros_stay_zero() -> None:
    assert sq.fake_quantize_activation_per_token_symmetric(torch.zeros(2, 4).half()).dtype == torch.float16
    assert not sq.fake_quantize_activation_per_token_asymmetric(torch.zeros(2, 4)).any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="n_bits"):
        sq.fake_quantize_weight_per_tensor_symmetric(X, n_bits=1)
    with pytest.raises(ValidationError, match="scales of shape"):
        sq.fake_quantize_weight_per_channel_symmetric(torch.ones(4, 3), torch.ones(3))
    with pytest.raises(ValidationError, match="positive and finite"):
        sq.fake_quantize_weight_per_channel_symmetric(torch.ones(4, 3), torch.zeros(4))
    with pytest.raises(ConfigurationError, match="zero points"):
        fake_quantize(torch.ones(4, 3), "rows", None, torch.zeros(4))
