"""Palettes: as good as coremltools' exact k-means, and what the formats make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from coremltools.optimize.coreml._quantization_passes import palettize_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from qwodel.backends.coreml.compress import divisor, palettize


def squared_error(values: np.ndarray, palette: np.ndarray, codes: np.ndarray) -> float:
    return float(((values.astype(np.float64) - palette.astype(np.float64)[codes]) ** 2).sum())


def decibels(values: np.ndarray, error: float) -> float:
    return float(10 * np.log10((values.astype(np.float64) ** 2).sum() / error))


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.mlp.gate_proj", "layers.5.mlp.down_proj"])
def test_trained_weights_lose_no_more_than_with_coremltools_own_k_means(
    stories15m: Path, name: str, bits: int
) -> None:
    """More than 10,000 float16 values go to coremltools' exact algorithm."""
    weights = load_file(stories15m / "model.safetensors")[f"model.{name}.weight"].astype(np.float16)[:64]
    lut, indices = palettize_weights._get_lut_and_indices(weights, "KMEANS", bits, None)
    exact = squared_error(weights.reshape(-1), lut, indices.reshape(-1))
    ours = squared_error(weights, *palettize(weights, bits))
    assert decibels(weights, ours) > decibels(weights, exact) - 0.02


@pytest.mark.parametrize("degrees", [2.0, 3.0, 30.0])
def test_heavy_tails_too(degrees: float) -> None:
    values = np.random.default_rng(0).standard_t(degrees, 12_000).astype(np.float16)
    lut, indices = palettize_weights._get_lut_and_indices(values, "KMEANS", 6, None)
    exact = squared_error(values, lut, indices.reshape(-1))
    assert decibels(values, squared_error(values, *palettize(values, 6))) > decibels(values, exact) - 0.05


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-60000, 60000, width=16), min_size=1, max_size=300),
    st.sampled_from([4, 6]),
    st.sampled_from(["kmeans", "uniform"]),
)
def test_every_code_is_the_nearest_and_few_values_are_exact(
    values: list[float], bits: int, mode: str
) -> None:
    array = np.array(values, np.float16)
    palette, codes = palettize(array, bits, mode)
    wide = palette.astype(np.float64)
    assert palette.shape == (1 << bits,)
    assert (np.diff(wide) >= 0).all()
    distance = np.abs(array.astype(np.float64)[:, None] - wide)
    assert np.allclose(distance[np.arange(len(array)), codes], distance.min(1), rtol=0, atol=0)
    if mode == "kmeans" and len(np.unique(array)) <= 1 << bits:
        assert (palette[codes] == array).all()


def test_a_uniform_palette_has_even_steps() -> None:
    values = np.random.default_rng(0).normal(size=4096).astype(np.float16)
    palette, codes = palettize(values, 4, "uniform")
    steps = np.diff(palette.astype(np.float64))
    assert palette[0] == values.min()
    assert palette[-1] == values.max()
    assert np.abs(steps - steps.mean()).max() < 2e-3
    assert squared_error(values, palette, codes) > squared_error(values, *palettize(values, 4))


@pytest.mark.parametrize(
    ("total", "wanted", "found"),
    [(288, 32, 32), (30522, 32, 6), (50257, 32, 29), (1000, 32, 25), (5087, 32, 0)],
)
def test_groups_divide_the_channels(total: int, wanted: int, found: int) -> None:
    assert divisor(total, wanted, 4) == found
