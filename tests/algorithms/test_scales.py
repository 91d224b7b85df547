from __future__ import annotations

import comfy_kitchen.backends.eager as comfy
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from hypothesis import given, settings

from qwodel.algorithms import tiles
from qwodel.algorithms.quant_types import FP8_E4M3, INT8, MXFP8_E4M3, QUANT_TYPES, ROW, TENSOR, Granularity
from qwodel.algorithms.scales import (
    Quantized,
    absmax_scale,
    dequantize,
    nearest_codes,
    quantize_matrix,
    search_scale,
)
from qwodel.exceptions import ConfigurationError, ValidationError

from .strategies import FREELY_SCALED, granularities, grid_of, quant_types, spread, weights

GRANULARITIES = [TENSOR, ROW, Granularity.group(64), Granularity.group(100), Granularity.block(64)]


def heavy(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Weights with heavy tails and rows of different sizes, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    body = torch.randn(rows, cols, generator=generator)
    return body * body.abs() * torch.rand(rows, 1, generator=generator)


def gram_of(cols: int, seed: int = 1) -> torch.Tensor:
    """Gram matrix of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    spread_ = torch.logspace(0, -3, cols, dtype=torch.float64)
    inputs = torch.randn(4 * cols, cols, generator=generator, dtype=torch.float64) * spread_ @ mix
    return inputs.T @ inputs


@settings(max_examples=150, deadline=None)
@given(weights(), quant_types, granularities)
def test_round_to_nearest_against_exhaustive_search(weight, quant_type, granularity):
    before = weight.clone()
    quantized = quantize_matrix(weight, quant_type, granularity)
    assert torch.equal(weight, before)
    assert quantized.codes.dtype == quant_type.dtype
    assert quantized.codes.shape == weight.shape
    assert quantized.scale.shape == granularity.scale_shape(weight.shape)
    assert quantized.scale.dtype == torch.float32
    assert (quantized.scale >= torch.finfo(torch.float32).tiny).all()
    scale = spread(quantized.scale, granularity, tuple(weight.shape)).double()
    exact = weight.double() / scale
    grid = grid_of(quant_type)
    codes = quantized.codes.double()
    assert torch.isin(codes, grid).all()
    if weight.numel():
        right = torch.searchsorted(grid, exact).clamp(1, len(grid) - 1)
        nearest = torch.minimum((grid[right] - exact).abs(), (grid[right - 1] - exact).abs())
        slack = exact.abs() * 2**-22  # the quotient is rounded to fp32 first
        assert ((codes - exact).abs() <= nearest + slack).all()
    assert torch.equal(quantized.dequantize(torch.float64), codes * scale)
    assert quantized.dequantize().isfinite().all()


@settings(max_examples=80, deadline=None)
@given(weights(), quant_types, granularities)
def test_absmax_scale_is_the_least_that_does_not_saturate(weight, quant_type, granularity):
    scale = absmax_scale(weight, quant_type, granularity)
    magnitude = weight.double().abs()
    everywhere = spread(scale, granularity, tuple(weight.shape)).double()
    assert (magnitude <= everywhere * quant_type.qmax * (1 + 1e-6)).all()
    assert torch.equal(scale == 1, _group_peak(magnitude, granularity) == 0) or (scale == 1).all()


def _group_peak(magnitude, granularity):
    peak = torch.zeros(granularity.scale_shape(magnitude.shape), dtype=torch.float64)
    for i in range(magnitude.shape[0]):
        for j in range(magnitude.shape[1]):
            row = i // granularity.block_rows if granularity.block_rows else 0
            col = j // granularity.block_cols if granularity.block_cols else 0
            index = (row, col) if peak.ndim else ()
            peak[index] = max(peak[index], magnitude[i, j])
    return peak


def _errors(weight, quantized, granularity, gram=None):
    """Objective of every scale group in fp64, from plain slices."""
    error = quantized.dequantize(torch.float64) - weight.double()
    gram = torch.eye(weight.shape[1], dtype=torch.float64) if gram is None else gram
    height, width = granularity.block_rows or weight.shape[0], granularity.block_cols or weight.shape[1]
    costs = []
    for i in range(0, weight.shape[0], height):
        for j in range(0, weight.shape[1], width):
            block = error[i : i + height, j : j + width]
            costs.append(((block @ gram[j : j + width, j : j + width]) * block).sum())
    return torch.stack(costs)


@settings(max_examples=60, deadline=None)
@given(weights(least=1), quant_types, granularities)
def test_searched_scale_is_never_worse_in_any_group(weight, quant_type, granularity):
    plain = quantize_matrix(weight, quant_type, granularity)
    searched = quantize_matrix(weight, quant_type, granularity, search_scale(weight, quant_type, granularity))
    noise = (plain.scale.double().max() * quant_type.qmax * 1e-7) ** 2 * weight.numel()
    allowed = _errors(weight, plain, granularity) * (1 + 1e-5) + noise
    assert (_errors(weight, searched, granularity) <= allowed).all()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("quant_type", FREELY_SCALED, ids=str)
@pytest.mark.parametrize("statistics", ["none", "channels", "gram"])
def test_search_lowers_its_own_objective(quant_type, granularity, statistics):
    weight, gram = heavy(96, 160), gram_of(160)
    form = {"none": None, "channels": gram.diagonal().diag(), "gram": gram}[statistics]
    given_ = {"none": {}, "channels": {"channel_weights": gram.diagonal()}, "gram": {"gram": gram}}[
        statistics
    ]
    plain = quantize_matrix(weight, quant_type, granularity)
    searched = quantize_matrix(
        weight, quant_type, granularity, search_scale(weight, quant_type, granularity, **given_)
    )
    before, after = _errors(weight, plain, granularity, form), _errors(weight, searched, granularity, form)
    assert (after <= before * (1 + 1e-4)).all()
    if granularity != TENSOR:  # a single scale may have been the best already
        assert after.sum() < before.sum()


@pytest.mark.parametrize("granularity", [TENSOR, ROW], ids=str)
def test_search_over_a_wide_gram_matrix_takes_the_best_candidate(granularity):
    weight, gram = heavy(24, 600), gram_of(600)
    base = absmax_scale(weight, FP8_E4M3, granularity)

    def costs(scale):
        error = quantize_matrix(weight, FP8_E4M3, granularity, scale).dequantize().double() - weight.double()
        rows = ((error @ gram) * error).sum(1, keepdim=True)
        return rows if granularity == ROW else rows.sum()

    candidates = torch.stack([costs(base * 2 ** (k / 12)) for k in range(12)])
    chosen = costs(search_scale(weight, FP8_E4M3, granularity, gram=gram))
    assert (chosen <= candidates.amin(dim=0) * (1 + 1e-4)).all()
    if granularity == ROW:
        assert (chosen < 0.9 * candidates[0]).any()


def test_search_with_identity_gram_is_the_search_without():
    weight = heavy(33, 70)
    for granularity in (TENSOR, ROW, Granularity.group(32)):
        plain = search_scale(weight, FP8_E4M3, granularity, candidates=16)
        same = search_scale(weight, FP8_E4M3, granularity, gram=torch.eye(70) * 5, candidates=16)
        torch.testing.assert_close(same, plain)


def test_fp8_search_stays_within_an_octave_above_absmax():
    weight = heavy(64, 64)
    ratio = search_scale(weight, FP8_E4M3, ROW) / absmax_scale(weight, FP8_E4M3, ROW)
    assert ratio.min() > 0.95  # least squares may step just outside
    assert ratio.max() < 2.1


@pytest.mark.parametrize("quant_type", QUANT_TYPES.values(), ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_same_bits_for_any_chunk_size_and_thread_count(monkeypatch, quant_type, granularity):
    weight, gram = heavy(257, 515).bfloat16(), gram_of(515)
    results = []
    for threads, elements in ((1, 1 << 18), (2, 1 << 18), (1, 1000), (3, 20_000)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(tiles.row_chunks, "__defaults__", (elements,))
        scale = search_scale(weight, quant_type, granularity)
        quantized = quantize_matrix(weight, quant_type, granularity)
        monkeypatch.setattr(tiles.row_chunks, "__defaults__", (1 << 18,))  # products keep their chunks
        with_gram = search_scale(weight[:40], quant_type, granularity, gram=gram, candidates=2)
        results.append(
            (scale, with_gram, quantized.scale, quantized.codes.view(torch.uint8), quantized.dequantize())
        )
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_comfy_kitchen_decodes_what_we_report(dtype):
    weight = heavy(40, 48).to(dtype)
    fp8 = quantize_matrix(weight, FP8_E4M3, TENSOR)
    theirs = comfy.dequantize_per_tensor_fp8(fp8.codes, fp8.scale, torch.float32)
    assert torch.equal(theirs, fp8.dequantize())
    for granularity in (TENSOR, ROW):
        int8 = quantize_matrix(weight, INT8, granularity)
        assert torch.equal(comfy.dequantize_int8_simple(int8.codes, int8.scale), int8.dequantize())


def test_comfy_kitchen_rounds_to_the_same_codes():
    weight = heavy(64, 64)
    ours = quantize_matrix(weight, FP8_E4M3, TENSOR)
    theirs = comfy.quantize_per_tensor_fp8(weight, ours.scale)
    different = (ours.codes.float() != theirs.float()).float().mean()
    assert different < 1e-3  # it multiplies by 1/scale; ties may fall the other way


@pytest.mark.parametrize("quant_type", [INT8, FP8_E4M3], ids=str)
def test_compressed_tensors_agrees(quant_type):
    weight = heavy(32, 64)
    ours = quantize_matrix(weight, quant_type, ROW)
    args = QuantizationArgs(num_bits=8, type="float" if quant_type.is_float else "int", strategy="channel")
    zero = torch.zeros_like(ours.scale)
    codes = ct_quantize(weight, ours.scale, zero, args, dtype=quant_type.dtype)
    assert torch.equal(codes.float(), ours.codes.float())
    torch.testing.assert_close(ct_dequantize(ours.codes, ours.scale, args=args), ours.dequantize())


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize(
    ("value", "found"), [(float("nan"), "1 NaN"), (float("inf"), "1 Inf"), (-float("inf"), "1 Inf")]
)
def test_what_is_not_finite_is_named(granularity, value, found):
    weight = heavy(70, 130)
    weight[69, 129] = value
    for call in (
        lambda: absmax_scale(weight, INT8, granularity),
        lambda: quantize_matrix(weight, INT8, granularity),
        lambda: search_scale(weight, FP8_E4M3, granularity),
        lambda: quantize_matrix(
            weight, FP8_E4M3, granularity, torch.ones(granularity.scale_shape(weight.shape))
        ),
    ):
        with pytest.raises(ValidationError, match=found):
            call()


def test_fp64_beyond_fp32_is_refused():
    with pytest.raises(ValidationError, match="fp32"):
        absmax_scale(torch.full((2, 2), 1e300, dtype=torch.float64), INT8, ROW)


def test_given_scales_saturate_instead_of_overflowing():
    weight = torch.tensor([[1000.0, -1000.0, 0.5]])
    for quant_type in QUANT_TYPES.values():
        codes = quantize_matrix(weight, quant_type, TENSOR, torch.tensor(1e-4)).codes.float()
        assert codes.tolist() == [
            [
                quant_type.qmax,
                quant_type.qmin,
                min(5000.0, quant_type.qmax) if quant_type.qmax < 5000 else 5120.0,
            ]
        ]


@pytest.mark.parametrize(
    "scale", [torch.ones(2), torch.zeros(()), torch.tensor(-1.0), torch.tensor(float("nan"))]
)
def test_impossible_scales_are_refused(scale):
    with pytest.raises(ValidationError):
        quantize_matrix(torch.ones(2, 2), INT8, TENSOR, scale)


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(2, 2, 2), torch.ones(2, 2, dtype=torch.int32)])
def test_only_float_matrices(weight):
    with pytest.raises(ValidationError):
        quantize_matrix(weight, INT8, TENSOR)


def test_codes_must_have_their_type():
    with pytest.raises(ValidationError, match="int8"):
        Quantized(torch.zeros(2, 2), torch.ones(()), INT8, TENSOR)
    with pytest.raises(ValidationError, match="does not fit"):
        dequantize(torch.zeros(2, 2, dtype=torch.int8), torch.ones(2), ROW)


@pytest.mark.parametrize(
    ("statistics", "error"),
    [
        ({"gram": torch.eye(3)}, ValidationError),
        ({"gram": torch.full((4, 4), float("nan"))}, ValidationError),
        ({"gram": torch.randn(4, 4, generator=torch.Generator().manual_seed(0))}, ValidationError),
        ({"gram": -torch.eye(4)}, ValidationError),
        ({"channel_weights": torch.ones(3)}, ValidationError),
        ({"channel_weights": -torch.ones(4)}, ValidationError),
        ({"channel_weights": torch.ones(4), "gram": torch.eye(4)}, ConfigurationError),
        ({"candidates": 0}, ConfigurationError),
    ],
)
def test_statistics_that_do_not_fit(statistics, error):
    with pytest.raises(error):
        search_scale(torch.ones(2, 4), INT8, ROW, **statistics)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", [TENSOR, ROW, Granularity.group(24), Granularity.block(24)])
def test_absmax_of_every_16_bit_number(dtype, granularity):
    """Magnitudes are compared as bits there, and as numbers in fp64."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    weight = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))]
    weight = weight[: len(weight) // 250 * 250].reshape(-1, 250)
    found = absmax_scale(weight, INT8, granularity)
    assert torch.equal(found, absmax_scale(weight.double(), INT8, granularity))


@pytest.mark.parametrize("quant_type", FREELY_SCALED, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_nothing_saturates_by_the_scale_of_absolute_maxima(quant_type, dtype):
    """Peaks whose scale was rounded, and the smallest and largest a dtype has, give the largest code and none beyond."""
    peaks = torch.cat(
        [
            torch.rand(4000, dtype=torch.float64) + 0.5,
            torch.tensor([torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal * 3, 1e-7, 6e4]),
            torch.tensor([min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)], dtype=torch.float64),
        ]
    ).to(dtype)
    weight = torch.stack([peaks, -peaks], 1)
    scale = absmax_scale(weight, quant_type, ROW)
    codes = nearest_codes(weight, scale, quant_type, ROW).double()
    assert torch.equal(codes, quantize_matrix(weight, quant_type, ROW, scale).codes.double())
    # A scale that would be no normal fp32 is larger than the peak asks for.
    normal = peaks.double() / quant_type.qmax > torch.finfo(torch.float32).tiny
    assert (codes[normal].abs() == quant_type.qmax).all()


@settings(max_examples=60, deadline=None)
@given(weights(least=1), granularities)
def test_scales_that_are_powers_of_two_are_the_least_that_saturate_nothing(weight, granularity):
    scale = absmax_scale(weight, MXFP8_E4M3, granularity)
    free = absmax_scale(weight, FP8_E4M3, granularity)
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all()
    zeros = free == 1.0
    assert ((scale >= free) & (scale < 2 * free) | zeros).all()
    assert torch.equal(search_scale(weight, MXFP8_E4M3, granularity), scale)
